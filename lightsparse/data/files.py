"""Local files: text (one document per file), jsonl and parquet (one document per row).

Tables are read through `datasets` in streaming mode, which needs no network and writes no second copy of the data.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightsparse.data.documents import Document, TextFile, column_text
from lightsparse.data.source import DataError
from lightsparse.data.text import TextConfig
from lightsparse.utils.compat.datasets import READERS_LOGGER

logging.getLogger(READERS_LOGGER).setLevel(logging.CRITICAL)

TABLE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # by suffix; every other file is text


@dataclass(frozen=True, kw_only=True)
class FilesData(TextConfig):
    path: str = ""  # a file, a folder (all files below it but hidden ones) or a glob such as 'texts/**/*.txt'
    val_path: str | None = None  # the same, held out as a whole; null: hold out val_fraction of `path` by hash
    column: str = "text"  # column of jsonl and parquet files that holds the text

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("data.path is empty; give a file, a folder or a glob, as in data=files data.path=texts/")
        train, val = matching_files(self.path), matching_files(self.val_path) if self.val_path is not None else {}
        for field, pattern, files in (("path", self.path, train), ("val_path", self.val_path, val)):
            if pattern is not None and not files:
                raise ValueError(
                    f"data.{field} is {pattern!r} and no file is there; give a file, a folder with files or a glob "
                    f"(a relative one starts at {os.getcwd()})"
                )
        shared = set(train.values()) & set(val.values())
        if shared:
            raise ValueError(
                f"data.path and data.val_path share {len(shared)} files such as {min(shared)}; "
                "validation text must not be trained on, so name them apart"
            )

    def documents(self) -> Iterator[Document]:
        """Documents named by their path below the folder (and row in a table)."""
        yield from self._documents(self.path, validation=None if self.val_path is None else False)
        if self.val_path is not None:
            yield from self._documents(self.val_path, validation=True)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "files": files_digest(self._paths())}

    def text_bytes(self) -> int | None:
        paths = self._paths()
        is_table = any(path.suffix.lower() in TABLE_READERS for path in paths)
        return None if is_table else sum(path.stat().st_size for path in paths)

    def _paths(self) -> list[Path]:
        patterns = [self.path] if self.val_path is None else [self.path, self.val_path]
        return [path for pattern in patterns for path in matching_files(pattern).values()]

    def _documents(self, pattern: str, validation: bool | None) -> Iterator[Document]:
        for name, path in matching_files(pattern).items():
            reader = TABLE_READERS.get(path.suffix.lower())
            if reader is None:
                yield Document(name, TextFile(path), validation)
                continue
            for row, content in enumerate(table_rows(path, reader)):
                yield Document(f"{name}:{row}", column_text(content, self.column, str(path)), validation)


def matching_files(pattern: str) -> dict[str, Path]:
    """The files that a path, folder or glob stands for, sorted, by their name below its fixed part."""
    path = Path(os.path.expanduser(pattern)).absolute()
    if path.is_file():
        return {path.name: path}
    root, below = path, "**"
    if not path.is_dir():
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        below = str(path.relative_to(root))
    found = sorted(Path(name).as_posix() for name in glob.glob(below, root_dir=root, recursive=True))
    return {name: root / name for name in found if (root / name).is_file()}


def files_digest(paths: Iterable[Path]) -> str:
    """16 hex digits over names, sizes and times of change: another text is another digest, without reading it."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def table_rows(path: Path, reader: str) -> Iterator[dict[str, Any]]:
    """Rows of one jsonl or parquet file; none for an empty file."""
    if path.stat().st_size == 0:
        return
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(reader, data_files=[glob.escape(str(path))], split="train", streaming=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; convert it, or leave it out by a glob for data.path") from error
    except (ValueError, DatasetsError) as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read as {reader}: {first_line}") from error
