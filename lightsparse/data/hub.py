"""Any data set of the Hugging Face hub that consists of data files, read through `datasets`.

Code from the hub is never run: `datasets` 5 has no scripts any more, and trust_remote_code is not passed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lightsparse.data.documents import Document, column_text
from lightsparse.data.files import files_digest
from lightsparse.data.source import DataError
from lightsparse.data.text import TextConfig
from lightsparse.utils.compat.datasets import is_offline

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
        if self.val_split == self.split:
            raise ValueError(
                f"data.split and data.val_split are both {self.split!r}; validation text must not be trained on, "
                "so name another split, or null to hold out a share of this one"
            )

    def identity(self) -> dict[str, Any]:
        if not os.path.isdir(self.name):
            return {**super().identity(), "commit": check_reachable(self.name, self.revision)}
        files = sorted(path for path in Path(self.name).rglob("*") if path.is_file())
        return {**super().identity(), "files": files_digest(files)}

    def documents(self) -> Iterator[Document]:
        """Documents named by split and row, up to the one that reaches max_characters."""
        if not os.path.isdir(self.name):
            check_reachable(self.name, self.revision)
        yield from self._documents(self.split, validation=None if self.val_split is None else False)
        if self.val_split is not None:
            yield from self._documents(self.val_split, validation=True)

    def _documents(self, split: str, validation: bool | None) -> Iterator[Document]:
        characters = 0
        for row, content in enumerate(self._read(split)):
            text = column_text(content, self.column, self.name)
            yield Document(f"{split}:{row}", text, validation)
            characters += len(text)
            if self.max_characters is not None and characters >= self.max_characters:
                log.info("%s: stopped at data.max_characters after %d documents of %s", self.name, row + 1, split)
                return

    def _read(self, split: str) -> Iterator[dict[str, Any]]:
        rows, row = iter(self._rows(split)), 0
        while True:
            try:
                content = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a lost connection or a damaged file, with a class of the reader's own
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise DataError(
                    f"data set {self.name!r}, split {split!r}, cannot be read beyond row {row}: {reason}"
                ) from error
            yield content
            row += 1

    def _rows(self, split: str) -> Iterable[dict[str, Any]]:
        try:
            return load_dataset(self.name, self.config, split=split, revision=self.revision, streaming=self.streaming)
        except ConnectionError as error:
            raise _unreachable(self.name, error) from error
        except (ValueError, OSError, RuntimeError, DatasetsError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"data set {self.name!r}, split {split!r}, cannot be loaded: {reason}") from error


def check_reachable(name: str, revision: str | None) -> str | None:
    """The commit that the revision stands for; None, unasked, in offline mode.

    DataError within seconds if the hub, or this data set on it, cannot be read.
    """
    if is_offline():
        return None
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=CONNECT_SECONDS).sha
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"data set {name!r}, revision {revision or 'main'}, cannot be read: {reason}") from error
    except Exception as error:  # a failed connection has another class in every HTTP client the hub's package has used
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> DataError:
    return DataError(
        f"the hub is not reachable for data set {name!r} ({error}); without it work data=stdlib, data=files, and with "
        "HF_HUB_OFFLINE=1 data.streaming=false what is in the local cache"
    )
