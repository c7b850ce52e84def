"""Tokens on disk: files of bounded size, read through memory maps, written so that a kill loses one shard at most.

    shard-00000.tokens  ids, one after the other, in the manifest's dtype (little-endian)
    shard-00000.npy     entries (encoding.ENTRY) of the documents that end in it
    shard-00000.json    written last: the shard is complete; its numbers, and where the next one begins in the source
    source.json         what is being prepared; another source or tokenizer is refused
    manifest.json       written at the very end: all is there

A document may lie across shards. Every file is written aside, flushed and renamed. Writing goes on after the last
complete shard: what lies before it in the source is read (a document's beginning) or skipped, and not encoded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lightsparse.data.documents import Document
from lightsparse.data.encoding import ENTRY, Encoded, OpenDocument, encoded_pieces
from lightsparse.data.errors import DataError, read_json, reading
from lightsparse.data.tokens import Tokenizer, token_dtype
from lightsparse.utils.atomic_files import atomic_write, write_text
from lightsparse.utils.text import first_line

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 26  # tokens after which a shard ends, at the next end of a piece


@dataclass(frozen=True)
class Place:
    """Where writing stands in the source."""

    document: int = 0  # documents that have ended, empty ones included
    piece: int = 0  # pieces written of the one after
    start: int = 0  # place of its bos in all tokens
    tokens: int = 0  # of it, so far
    digest: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Shard:
    """One complete shard."""

    number: int
    tokens: int
    documents: int  # that end in it, with text
    empty_documents: int
    text_bytes: int
    checksum: str  # of both files
    after: Place

    @property
    def name(self) -> str:
        return f"shard-{self.number:05}"


@dataclass(frozen=True)
class Manifest:
    """All shards of a folder."""

    folder: Path
    shards: tuple[Shard, ...]
    dtype: str  # numpy's name
    vocab_size: int
    tokenizer: str  # fingerprint

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def empty_documents(self) -> int:
        return sum(shard.empty_documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    def entries(self) -> np.ndarray:
        """Of every document, in the order of the source."""
        return np.concatenate([_entries(self.folder, shard) for shard in self.shards])

    def verify(self) -> None:
        """DataError naming the first shard whose files are not what was written."""
        for shard in self.shards:
            with reading(self.folder / shard.name):
                found = _checksum(self.folder, shard.name)
            if found != shard.checksum:
                raise DataError(
                    f"{self.folder / shard.name}.* is damaged: its checksum is not the manifest's; remove the folder "
                    "and prepare it again"
                )


class ShardedTokens:
    """The tokens of all shards as one array [tokens]; only what is sliced is read."""

    def __init__(self, manifest: Manifest):
        self.dtype = np.dtype(manifest.dtype)
        self._paths = [manifest.folder / f"{shard.name}.tokens" for shard in manifest.shards]
        self._borders = np.cumsum([0, *(shard.tokens for shard in manifest.shards)])

    def __len__(self) -> int:
        return int(self._borders[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        parts = [np.empty(0, self.dtype)]
        shard = int(np.searchsorted(self._borders, start, side="right")) - 1
        while start < stop:
            offset = start - int(self._borders[shard])
            count = min(stop - start, int(self._borders[shard + 1]) - start)
            if count:
                parts.append(_mapped(self._paths[shard], self.dtype)[offset : offset + count])
            start, shard = start + count, shard + 1
        return parts[1] if len(parts) == 2 else np.concatenate(parts)


def write_shards(
    documents: Callable[[int], Iterator[Document]],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[int, int], None] = lambda text_bytes, tokens: None,
) -> Manifest:
    """Everything as shards in `folder`, from the last complete one on. Only one process may do this at a time.

    documents  given how many to skip, the rest, in an order that stays
    report     called after every piece with the bytes of text and the tokens that are new
    Memory depends neither on the number of documents nor on their sizes, but for the entries of one shard.
    """
    shards = complete_shards(folder)
    place = shards[-1].after if shards else Place()
    if not place.finished:
        pieces = encoded_pieces(documents(place.document), tokenizer, skip=place.piece)
        while not place.finished:
            shard = _write_shard(pieces, tokenizer, folder, len(shards), place, shard_tokens, report)
            shards, place = [*shards, shard], shard.after
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<").str
    manifest = Manifest(folder, tuple(shards), dtype, tokenizer.vocab_size, tokenizer.fingerprint)
    write_text(folder / MANIFEST, json.dumps(_as_json(manifest), indent=1) + "\n")
    return manifest


def complete_shards(folder: Path) -> list[Shard]:
    """Those of an unfinished folder, from the first on without a gap."""
    shards: list[Shard] = []
    while (path := folder / f"shard-{len(shards):05}.json").is_file():
        shards.append(read_json(path, _shard))
    return shards


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder. DataError where there is none, or files are missing or cut short."""
    path = folder / MANIFEST
    if not path.is_file():
        begun = (folder / "source.json").is_file()
        state = "is not finished; the command that began it continues it" if begun else "holds no prepared tokens"
        raise DataError(f"{folder} {state} (lightsparse prepare … out={folder})")
    manifest = read_json(path, lambda content: _manifest(folder, content))
    width = np.dtype(manifest.dtype).itemsize
    for shard in manifest.shards:
        file = folder / f"{shard.name}.tokens"
        size = file.stat().st_size if file.is_file() else 0
        if size != shard.tokens * width:
            raise DataError(
                f"{file} has {size} bytes, the manifest says {shard.tokens * width}; copy it again, or remove the "
                "folder and prepare it again"
            )
    return manifest


def _write_shard(
    pieces: Iterator[Encoded],
    tokenizer: Tokenizer,
    folder: Path,
    number: int,
    place: Place,
    shard_tokens: int,
    report: Callable[[int, int], None],
) -> Shard:
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    bos = np.array([tokenizer.bos], dtype=dtype)
    current, document, piece = OpenDocument(place.start, place.tokens, place.digest), place.document, place.piece
    entries, tokens, empty, text_bytes, finished = [], 0, 0, 0, True
    name = f"shard-{number:05}"
    with atomic_write(folder / f"{name}.tokens") as file:
        for encoded in pieces:
            if encoded.tokens is None:
                if encoded.number:
                    entries.append(current.entry(encoded.document))
                else:
                    empty += 1
                current = OpenDocument(current.start + current.tokens)
                document, piece = document + 1, 0
                continue
            new = 0
            for part in [bos, encoded.tokens] if encoded.number == 0 else [encoded.tokens]:
                file.write(np.ascontiguousarray(part, dtype=dtype).data)
                current.add(part)
                new += len(part)
            piece = encoded.number + 1
            size = len(encoded.text.encode())
            tokens, text_bytes = tokens + new, text_bytes + size
            report(size, new)
            if tokens >= shard_tokens:
                finished = False
                break
    with atomic_write(folder / f"{name}.npy") as file:
        np.save(file, np.array(entries, dtype=ENTRY), allow_pickle=False)
    after = Place(document, piece, current.start, current.tokens, current.digest, finished)
    shard = Shard(number, tokens, len(entries), empty, text_bytes, _checksum(folder, name), after)
    write_text(folder / f"{name}.json", json.dumps(dataclasses.asdict(shard), indent=1) + "\n")
    return shard


def _checksum(folder: Path, name: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for suffix in ("tokens", "npy"):
        with (folder / f"{name}.{suffix}").open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _entries(folder: Path, shard: Shard) -> np.ndarray:
    try:
        entries = np.load(folder / f"{shard.name}.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder / shard.name}.npy cannot be read: {first_line(error)}") from error
    if entries.dtype != ENTRY or len(entries) != shard.documents:
        raise DataError(f"{folder / shard.name}.npy is not the index that the manifest names; prepare the folder again")
    return entries


def _shard(content: dict[str, Any]) -> Shard:
    return Shard(**{**content, "after": Place(**content["after"])})


def _manifest(folder: Path, content: dict[str, Any]) -> Manifest:
    if content["format"] != FORMAT:
        path = folder / MANIFEST
        raise DataError(f"{path} has format {content['format']}, this version reads {FORMAT}; prepare it again")
    shards = tuple(_shard(shard) for shard in content["shards"])
    return Manifest(folder, shards, content["dtype"], content["vocab_size"], content["tokenizer"])


def _as_json(manifest: Manifest) -> dict[str, Any]:
    fields = {key: getattr(manifest, key) for key in ("tokens", "documents", "empty_documents", "text_bytes")}
    fields |= {key: getattr(manifest, key) for key in ("dtype", "vocab_size", "tokenizer")}
    return {"format": FORMAT, **fields, "shards": [dataclasses.asdict(shard) for shard in manifest.shards]}


@lru_cache(maxsize=1024)
def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    with reading(path):
        return np.memmap(path, dtype=dtype, mode="r")
