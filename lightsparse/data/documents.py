"""What every source of text is: a frozen config that yields named documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class DataError(ValueError):
    """The data cannot be used as asked: one sentence for the user, to be shown without a traceback."""


@dataclass(frozen=True)
class Document:
    name: str  # unique within the source and the same on every machine: the split hashes it
    text: str
    validation: bool | None = None  # which split it belongs to; None = by the hash of the name


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fields every source has. A source adds its own and yields `documents()`.

    Raises ValueError for a value out of range, naming the field.
    """

    context: int = 4096  # tokens per sample
    batch_size: int = 1  # samples per micro-batch and rank
    pack: Literal["isolate", "concat"] = "isolate"  # may a token see the document packed before its own: no | yes
    val_fraction: float = 0.05  # chance of a document to be held out; unused where the source names its own validation
    num_workers: int = 0  # loader processes per rank; 0 = in the training process

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"data.context is {self.context}; a context counts tokens and must be at least 1")
        if self.batch_size < 1:
            raise ValueError(
                f"data.batch_size is {self.batch_size}; it counts samples per micro-batch and must be at least 1"
            )
        if self.pack not in ("isolate", "concat"):
            raise ValueError(f"data.pack is {self.pack!r}; it must be isolate (documents apart) or concat (one stream)")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction is {self.val_fraction}; it is a share and must lie in (0, 1)")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}; it counts processes and must be at least 0")

    def documents(self) -> Iterator[Document]:
        """Every document of the source, in any order; DataError where the source cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} has no documents")


def hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: the same on every machine, process and Python."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8")).digest()[:6], "big") / (1 << 48)


def utf8_text(path: Path) -> str:
    """The file's text, byte for byte (line ends are kept)."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out by a glob such as "
            f"data.path='{path.parent}/*.txt'"
        ) from error


def column_text(row: Mapping[str, Any], column: str, name: str) -> str:
    """The text of one row of a table; a null is an empty text."""
    if column not in row:
        raise DataError(f"data.column is {column!r} but {name} has the columns {', '.join(row)}; name the text column")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"column {column!r} of {name} holds {type(text).__name__}, not text; set data.column")
    return text or ""
