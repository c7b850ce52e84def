"""Tokens: what every tokenizer does, and bytes as the one that needs nothing.

Bytes: 256 ids, nothing to train, every text in every language. The bytes 0xFE and 0xFF never occur in UTF-8 (RFC 3629),
so they serve as the two special tokens and the vocabulary stays at 256.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from lightsparse.data.text_chunks import Chunk


class Tokenizer(Protocol):
    """Text to ids and back. No text, whatever is written in it, gives one of the two special tokens."""

    @property
    def fingerprint(self) -> str:
        """Name and hex digits: where they are equal, equal texts give equal ids."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 … vocab_size − 1."""

    @property
    def bos(self) -> int:
        """Opens every document: packing finds the documents by it, generation stops at it."""

    @property
    def mask(self) -> int | None:
        """Hides a token under objective=mlm."""

    @property
    def unsettled(self) -> frozenset[int]:
        """Ids whose text may become another with the id after them, although it is no cut character."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, of `token_dtype(vocab_size)` [tokens]; no `bos`."""

    def encode_parts(self, parts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of all parts as one text, by parts: a token belongs to the part in which it ends."""

    def encode_chunks(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """Ids of the chunks of any number of texts; those of one text, cut at borders, are together `encode` of it."""

    def border(self, left: str, right: str) -> int:
        """Characters from the end of `left` to the place nearest to it where a token of left + right begins."""

    def decode(self, ids: Tensor | np.ndarray | Sequence[int]) -> str:
        """The text of ids [N]; what is not UTF-8 (a cut character) becomes U+FFFD."""

    def token_bytes(self) -> Tensor:
        """int64 [vocab]: bytes of text each id stands for (0 for special tokens), for bits per byte."""


class Additive(ABC):
    """A tokenizer to which a text is the sum of its parts, wherever it is cut."""

    unsettled: ClassVar[frozenset[int]] = frozenset()

    @abstractmethod
    def encode(self, text: str) -> np.ndarray: ...

    def encode_parts(self, parts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(part) for part in parts]

    def encode_chunks(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        return [self.encode(chunk.text) for chunk in chunks]

    def border(self, left: str, right: str) -> int:
        return 0


class ByteTokenizer(Additive):
    """UTF-8 bytes; `decode` shows special tokens as U+FFFD."""

    fingerprint = "bytes"
    vocab_size = 256
    bos = 0xFE
    mask = 0xFF

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Tensor | np.ndarray | Sequence[int]) -> str:
        return np.asarray(ids, dtype=np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> Tensor:
        lengths = torch.ones(self.vocab_size, dtype=torch.int64)
        lengths[[self.bos, self.mask]] = 0
        return lengths


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The narrowest of uint8, uint16 and int32 that holds every id."""
    if vocab_size <= 1 << 8:
        return np.uint8
    return np.uint16 if vocab_size <= 1 << 16 else np.int32
