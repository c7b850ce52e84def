"""Local files: text (one document per file), jsonl and parquet (one document per row).

Tables are read through `datasets` in streaming mode, which needs no network and writes no second copy of the data.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from heapq import heappop, heappush
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightsparse.data.documents import Document, TextFile, column_text
from lightsparse.data.errors import DataError, reading
from lightsparse.data.text import TextConfig
from lightsparse.utils.compat.datasets import READERS_LOGGER
from lightsparse.utils.text import first_line

logging.getLogger(READERS_LOGGER).setLevel(logging.CRITICAL)

ROWS = 256  # of a parquet file that are read at once; by default as many as its first group has, which may be none
# By suffix; every other file is text.
TABLE_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {"batch_size": ROWS}),
}


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
        held_out = set(map(same_file, val.values()))
        shared = [path for path in train.values() if same_file(path) in held_out]
        if shared:
            raise ValueError(
                f"data.path and data.val_path share {len(shared)} files such as {min(shared)}; "
                "validation text must not be trained on, so name them apart"
            )

    def documents(self) -> Iterator[Document]:
        """Documents named by their path below the folder (and row in a table)."""
        yield from self._documents(self._files(False), validation=None if self.val_path is None else False)
        yield from self._documents(self._files(True), validation=True)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "files": files_digest([*self._files(False), *self._files(True)])}

    def held_out_by(self) -> dict[Hashable, object]:
        train = self._files(False)
        rules: dict[Hashable, object] = {same_file(path): True for _, path in self._files(True)}
        for name, path in train:
            rules[same_file(path)] = (name, len(train) == 1, self.val_fraction) if self.val_path is None else False
        return rules

    def text_bytes(self) -> int | None:
        files = [*self._files(False), *self._files(True)]
        return None if any(map(_table_reader, files)) else sum(path.stat().st_size for _, path in files)

    def _files(self, validation: bool) -> list[tuple[str, Path]]:
        pattern = self.val_path if validation else self.path
        return [] if pattern is None else list(matching_files(pattern).items())

    def _documents(self, files: Iterable[tuple[str, Path]], validation: bool | None) -> Iterator[Document]:
        for name, path in files:
            table = _table_reader((name, path))
            if table is None:
                yield Document(name, TextFile(path), validation)
                continue
            for row, content in enumerate(table_rows(path, *table)):
                yield Document(f"{name}:{row}", column_text(content, self.column, str(path)), validation)


def _table_reader(file: tuple[str, Path]) -> tuple[str, dict[str, Any]] | None:
    """By the name, not by that of a file it links to."""
    return TABLE_READERS.get(Path(file[0]).suffix.lower())


def matching_files(pattern: str) -> dict[str, Path]:
    """The real paths of the files that a path, folder or glob stands for, sorted, by names below its fixed part.

    Links are followed. A file counts once, under the first name that leads to it through the fewest of them, and a
    folder is entered once, wherever it links to. DataError where a folder cannot be read.
    """
    path = Path(os.path.expanduser(pattern)).absolute()
    if path.is_file():
        return {path.name: path.resolve()}
    root, parts = path, ["**"]
    if not path.is_dir():
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        parts = list(path.parts[len(root.parts) :])
    found: list[tuple[bool, str, Path]] = []  # whether through a link, name, real path
    folders = [(False, "", root.resolve(), 0)] if parts and root.is_dir() else []
    entered = set()
    while folders:
        linked, below, folder, at = heappop(folders)  # those behind links last
        if (folder, at) in entered:
            continue
        entered.add((folder, at))
        part, is_last = parts[at], at + 1 == len(parts)
        if part == "**" and not is_last:  # stands for no folder, too
            heappush(folders, (linked, below, folder, at + 1))
        with reading(folder):
            entries = list(os.scandir(folder)) if part != ".." else []
        if part == "..":
            heappush(folders, (linked, f"{below}../", folder.parent, at + 1))
        for entry in entries:
            if entry.name.startswith(".") > part.startswith(".") or not (part == "**" or fnmatch(entry.name, part)):
                continue
            through, real = linked, folder / entry.name
            if entry.is_symlink():
                through, real = True, Path(os.path.realpath(real))  # a link to itself, too
            if real.is_dir() and (part == "**" or not is_last):
                heappush(folders, (through, f"{below}{entry.name}/", real, at if part == "**" else at + 1))
            elif is_last and real.is_file():
                found.append((through, below + entry.name, real))
    first = {same_file(real): (name, real) for _, name, real in sorted(found, reverse=True)}
    return dict(sorted(first.values()))


def same_file(path: Path) -> Hashable:
    """Equal for two real paths where they are one file."""
    with reading(path):
        status = path.stat()
    return (status.st_dev, status.st_ino) if status.st_nlink > 1 else path


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """16 hex digits over names, sizes and times of change: another text is another digest, without reading it."""
    digest = hashlib.blake2b(digest_size=8)
    for name, path in files:
        with reading(path):
            status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def table_rows(path: Path, reader: str, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of one jsonl or parquet file; none for an empty file."""
    with reading(path), path.open("rb") as file:
        if not file.read(1):
            return
    from datasets import load_dataset

    try:
        files = [glob.escape(str(path))]
        yield from load_dataset(reader, data_files=files, split="train", streaming=True, **options)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text; convert it, or leave it out by a glob for data.path") from error
    except Exception as error:  # of the reader, of what it decompresses with, or of the system
        raise DataError(f"{path} cannot be read as {reader}: {first_line(error)}") from error
