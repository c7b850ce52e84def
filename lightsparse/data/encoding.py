"""From documents to tokens, one piece after the other, and what is known of each document: its index entry.

In memory or in shards, tokens lie in the order of the source: bos, text, bos, text, … An entry says where a document
lies and which it is; split, order and filters follow from the entries alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lightsparse.data.documents import Document, name_key
from lightsparse.data.text_chunks import Chunk, chunks, cut
from lightsparse.data.tokens import Tokenizer, token_dtype

BATCH = 1 << 20  # characters that are encoded at once, on all threads the tokenizer has
ENTRY = np.dtype(
    [
        ("start", "<i8"),  # place of its bos in the tokens
        ("tokens", "<i8"),  # bos included
        ("name", "<u8"),  # name_key: the upper 48 bits are the share that decides the split, all the order
        ("digest", "<u8"),  # over its tokens
        ("validation", "i1"),  # 1 or 0 as the source says, -1 = by the name
    ]
)


@dataclass(frozen=True)
class Encoded:
    """A piece of a document, or its end."""

    document: Document
    number: int  # of the piece in the document
    text: str
    tokens: np.ndarray | None  # None: the document ends here


def encoded_pieces(documents: Iterable[Document], tokenizer: Tokenizer, skip: int = 0) -> Iterator[Encoded]:
    """Every piece of every document in order, and after the last of each document its end.

    skip  pieces of the first document that are read but not encoded, as they have been before
    Memory does not depend on the sizes of the documents.
    """
    batch: list[tuple[Document, int, Chunk]] = []  # an end has no text
    characters = 0
    for document in documents:
        number = 0
        for number, chunk in enumerate(chunks(cut(document.pieces()), tokenizer.border), 1):
            if number > skip:
                batch.append((document, number - 1, chunk))
                characters += len(chunk.text)
            if characters >= BATCH:
                yield from _encoded(batch, tokenizer)
                batch, characters = [], 0
        batch.append((document, number, Chunk("", "")))
        skip = 0
    yield from _encoded(batch, tokenizer)


def _encoded(batch: list[tuple[Document, int, Chunk]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    tokens = iter(tokenizer.encode_chunks([chunk for *_, chunk in batch if chunk.text]))
    for document, number, chunk in batch:
        yield Encoded(document, number, chunk.text, next(tokens) if chunk.text else None)


@dataclass
class OpenDocument:
    """A document whose end has not come yet: what its entry is made from."""

    start: int
    tokens: int = 0
    digest: int = 0  # of the pieces so far, each mixed with the one before

    def add(self, tokens: np.ndarray) -> None:
        state = hashlib.blake2b(self.digest.to_bytes(8, "big"), digest_size=8)
        state.update(np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<")).data)
        self.digest = int.from_bytes(state.digest(), "big")
        self.tokens += len(tokens)

    def entry(self, document: Document) -> tuple[int, int, int, int, int]:
        validation = -1 if document.validation is None else int(document.validation)
        return self.start, self.tokens, name_key(document.name), self.digest, validation


def encode_in_memory(documents: Iterable[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens [tokens], entries [documents] and the number of empty documents, which are left out.

    Needs about twice the memory of the tokens.
    """
    bos = np.array([tokenizer.bos], dtype=token_dtype(tokenizer.vocab_size))
    parts, entries, place, empty = [bos[:0]], [], 0, 0
    current = OpenDocument(0)
    for piece in encoded_pieces(documents, tokenizer):
        if piece.tokens is not None:
            new = [bos, piece.tokens] if piece.number == 0 else [piece.tokens]
            for tokens in new:
                current.add(tokens)
            parts += new
            continue
        if piece.number:
            entries.append(current.entry(piece.document))
        else:
            empty += 1
        place += current.tokens
        current = OpenDocument(place)
    return np.concatenate(parts), np.array(entries, dtype=ENTRY), empty
