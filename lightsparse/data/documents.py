"""Named documents, read from files and rows, whole or piece by piece."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lightsparse.data.errors import DataError, reading

READ = 1 << 17  # bytes read at once: small, or the heap is fragmented over gigabytes


@dataclass(frozen=True)
class Document:
    name: str  # unique within the source and the same on every machine: the split hashes it
    content: str | Iterable[str]  # the text, or what gives its pieces every time it is iterated over
    validation: bool | None = None  # which split it belongs to; None = by the hash of the name

    def pieces(self) -> Iterator[str]:
        """The text in pieces of any size; none for an empty one."""
        yield from filter(None, (self.content,) if isinstance(self.content, str) else self.content)

    @property
    def text(self) -> str:
        return "".join(self.pieces())


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 file of any size, byte for byte (line ends are kept); DataError where it cannot be read as that."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
        with reading(self.path), self.path.open("rb") as file:
            while True:
                block = file.read(READ)
                pending = len(decoder.getstate()[0])  # bytes of a character that the block before has cut
                try:
                    yield decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{self.path} is not UTF-8 text (byte {offset - pending + error.start}); convert it, or leave "
                        f"it out by a glob such as data.path='{self.path.parent}/*.txt'"
                    ) from error
                if not block:
                    return
                offset += len(block)


@dataclass(frozen=True)
class Excerpt:
    """Characters start … stop − 1 of a document (stop None: to its end)."""

    document: Document
    start: int
    stop: int | None

    def __iter__(self) -> Iterator[str]:
        place = 0
        for piece in self.document.pieces():
            stop = len(piece) if self.stop is None else self.stop - place
            if stop <= 0:
                return
            yield piece[max(0, self.start - place) : stop]
            place += len(piece)


def divided(documents: Callable[[int], Iterator[Document]], val_fraction: float) -> Callable[[int], Iterator[Document]]:
    """The source, in which a single document is two: all but its last `val_fraction` of characters, and those, held
    out. Chance can't hold out a share of one. Sources that name their splits, or have more documents, stay as they are.

    documents  given how many to skip, the rest
    """
    two = list(islice((document for document in documents(0) if next(document.pieces(), "")), 2))
    if len(two) != 1 or two[0].validation is not None:
        return documents
    whole = two[0]
    characters = sum(map(len, whole.pieces()))
    border = characters - max(1, round(characters * val_fraction))
    parts = (
        Document(f"{whole.name}[:{border}]", Excerpt(whole, 0, border), False),
        Document(f"{whole.name}[{border}:]", Excerpt(whole, border, None), True),
    )
    return lambda skip: islice(parts, skip, None)


def name_key(name: str) -> int:
    """64 bits that depend on the name alone: the same on every machine, process and Python."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: the upper 48 bits of its key."""
    return (name_key(name) >> 16) / (1 << 48)


def is_held_out(document: Document, val_fraction: float) -> bool:
    """Whether the document is for validation: as it says itself, or with a chance of `val_fraction`."""
    return hash_share(document.name) < val_fraction if document.validation is None else document.validation


def utf8_text(path: Path) -> str:
    """The file's text, byte for byte (line ends are kept). DataError for what is not UTF-8."""
    return "".join(TextFile(path))


def column_text(row: Mapping[str, Any], column: str, name: str) -> str:
    """The text of one row of a table; a null is an empty text."""
    if column not in row:
        raise DataError(f"data.column is {column!r} but {name} has the columns {', '.join(row)}; name the text column")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"column {column!r} of {name} holds {type(text).__name__}, not text; set data.column")
    return text or ""
