"""Named documents, and reading them from files and rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightsparse.data.source import DataError


@dataclass(frozen=True)
class Document:
    name: str  # unique within the source and the same on every machine: the split hashes it
    text: str
    validation: bool | None = None  # which split it belongs to; None = by the hash of the name


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
