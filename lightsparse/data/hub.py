"""Any data set of the Hugging Face hub that consists of data files, read through `datasets`.

Code from the hub is never run: `datasets` 5 has no scripts any more, and trust_remote_code is not passed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from datasets import ReadInstruction, load_dataset, load_dataset_builder
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lightsparse.data.documents import Document, column_text
from lightsparse.data.errors import DataError
from lightsparse.data.files import ROWS, files_digest, matching_files, same_file
from lightsparse.data.text import TextConfig
from lightsparse.utils.compat.datasets import is_offline
from lightsparse.utils.text import first_line

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5  # `datasets` itself retries for 23 s before it gives up on an unreachable hub


@dataclass(frozen=True, kw_only=True)
class HubData(TextConfig):
    name: str = ""  # as on the hub, such as emozilla/pg19, or a local folder laid out like one
    config: str | None = None  # subset of a data set that has several
    revision: str | None = None  # branch, tag or commit; refs/convert/parquet for data sets that were scripts
    split: str = "train"  # split to train on
    val_split: str | None = None  # split held out; null: hold out val_fraction of `split` by hash
    column: str = "text"  # column that holds the text
    streaming: bool = True  # read over the network as far as needed; false: download the data set to the cache first
    max_characters: int | None = 200_000_000  # of each split, from its start; null = all of it, for prepare or a cache

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            raise ValueError("data.name is empty; name a data set, as in data=hub data.name=emozilla/pg19")
        if self.revision is not None and os.path.isdir(self.name):
            raise ValueError(f"data.revision is {self.revision!r}, but {self.name} is a local folder, which has none")
        if self.max_characters is not None and self.max_characters < 1:
            raise ValueError(
                f"data.max_characters is {self.max_characters}; it counts characters, at least 1, and null is no limit"
            )
        if "[" not in f"{self.split}{self.val_split}":  # of slices it depends on the number of rows
            self._check_apart(dict.fromkeys(self._splits - {"all"} or {"all"}, 1))

    def identity(self) -> dict[str, Any]:
        if not os.path.isdir(self.name):
            return {**super().identity(), "commit": check_reachable(self.name, self.revision)}
        return {**super().identity(), "files": files_digest(matching_files(self.name).items())}

    def held_out_by(self) -> dict[Hashable, object]:
        data = os.path.realpath(self.name) if os.path.isdir(self.name) else self.name
        rules: dict[Hashable, object] = {(data, self.config, self.val_split): True} if self.val_split else {}
        return rules | {(data, self.config, self.split): False if self.val_split else self.val_fraction}

    def documents(self) -> Iterator[Document]:
        """Documents named by split and row, up to the one that reaches max_characters."""
        if not os.path.isdir(self.name):
            check_reachable(self.name, self.revision)
        rows = self._rows()
        if "[" in "".join(rows):
            self._check_apart({name: each.num_examples for name, each in rows[self.split].info.splits.items()})
        for split in rows:
            validation = None if self.val_split is None else split == self.val_split
            yield from self._documents(split, rows[split], validation)

    def _documents(self, split: str, rows: Iterable[dict[str, Any]], validation: bool | None) -> Iterator[Document]:
        characters = 0
        for row, content in enumerate(self._read(split, rows)):
            text = column_text(content, self.column, self.name)
            yield Document(f"{split}:{row}", text, validation)
            characters += len(text)
            if self.max_characters is not None and characters >= self.max_characters:
                log.info("%s: stopped at data.max_characters after %d documents of %s", self.name, row + 1, split)
                return

    def _read(self, split: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        row = 0
        try:
            for content in rows:
                yield content
                row += 1
        except Exception as error:  # a lost connection or a damaged file, with a class of the reader's own
            raise DataError(
                f"data set {self.name!r}, split {split!r}, cannot be read beyond row {row}: {first_line(error)}"
            ) from error

    def _rows(self) -> dict[str, Any]:
        """The rows of each split."""
        rows, split = {}, self.split
        try:
            load = self._loader()
            for split in filter(None, (self.split, self.val_split)):
                rows[split] = load(split)
        except ConnectionError as error:
            raise _unreachable(self.name, error) from error
        except DataError:
            raise
        except Exception as error:  # a damaged card or file, with a class of the reader's own
            reason = first_line(error)
            raise DataError(f"data set {self.name!r}, split {split!r}, cannot be loaded: {reason}") from error
        return rows

    def _loader(self) -> Callable[[str], Any]:
        """What gives the rows of a split."""
        if not os.path.isdir(self.name):
            how = {"revision": self.revision, "streaming": self.streaming}
            return lambda split: load_dataset(self.name, self.config, split=split, **how)
        builder: Any = load_dataset_builder(self.name, self.config)
        first: dict[Hashable, str] = {}
        for split, files in (builder.config.data_files or {}).items():
            for file in filter(os.path.exists, files if self._splits & {split, "all"} else ()):
                other = first.setdefault(same_file(Path(file).resolve()), file)
                if other is not file:
                    raise DataError(
                        f"data set {self.name!r} has one file as {other} and as {file}; validation text must not be "
                        "trained on, so take one of them away"
                    )
        if hasattr(builder.config, "batch_size"):
            builder.config.batch_size = ROWS
        if self.streaming:
            return builder.as_streaming_dataset
        builder.download_and_prepare()
        return builder.as_dataset

    @property
    def _splits(self) -> set[str]:
        """Those that split and val_split are slices and sums of; all stands for every one."""
        return {part.partition("[")[0].strip() for part in f"{self.split}+{self.val_split or self.split}".split("+")}

    def _check_apart(self, rows: Mapping[str, int]) -> None:
        """DataError where split and val_split have a row in common, given how many there are of each."""
        if self.val_split is None:
            return
        specs = ("+".join(rows) if split == "all" else split for split in (self.split, self.val_split))
        train, val = (ReadInstruction.from_spec(spec).to_absolute(rows) for spec in specs)
        for one, other in product(train, val):
            if one.splitname == other.splitname and max(one.from_, other.from_) < min(one.to, other.to):
                named = "" if self.split == self.val_split else f" ({self.split} and {self.val_split})"
                raise DataError(
                    f"data.split and data.val_split are both {one.splitname!r}{named}; validation text must not be "
                    "trained on, so name another split, or null to hold out a share of this one"
                )


def check_reachable(name: str, revision: str | None) -> str | None:
    """The commit that the revision stands for; None, unasked, in offline mode.

    DataError within seconds if the hub, or this data set on it, cannot be read.
    """
    if is_offline():
        return None
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=CONNECT_SECONDS).sha
    except (HfHubHTTPError, HFValidationError) as error:
        reason = first_line(error)
        raise DataError(f"data set {name!r}, revision {revision or 'main'}, cannot be read: {reason}") from error
    except Exception as error:  # a failed connection has another class in every HTTP client the hub's package has used
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> DataError:
    return DataError(
        f"the hub is not reachable for data set {name!r} ({error}); without it work data=stdlib, data=files, and with "
        "HF_HUB_OFFLINE=1 data.streaming=false what is in the local cache"
    )
