"""Bytes as tokens: 256 ids, nothing to train, every text in every language.

The bytes 0xFE and 0xFF never occur in UTF-8 (RFC 3629), so they serve as the two special tokens and the vocabulary
stays at 256: `bos` opens every document, `mask` hides a token under objective=mlm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ByteTokenizer:
    """UTF-8 bytes. `encode` never produces `bos` or `mask`: packing finds the documents by their `bos`."""

    name = "bytes"
    vocab_size = 256
    bos = 0xFE
    mask = 0xFF

    def encode(self, text: str) -> np.ndarray:
        """uint8 [bytes of text]; no `bos`."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Tensor | np.ndarray | Sequence[int]) -> str:
        """The text of the ids [N]; what is not UTF-8 (special tokens, a cut character) becomes U+FFFD."""
        return np.asarray(ids, dtype=np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> Tensor:
        """int64 [vocab]: bytes of text each id stands for (0 for `bos` and `mask`), for bits per byte."""
        lengths = torch.ones(self.vocab_size, dtype=torch.int64)
        lengths[[self.bos, self.mask]] = 0
        return lengths


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The narrowest of uint8, uint16 and int32 that holds every id."""
    if vocab_size <= 1 << 8:
        return np.uint8
    return np.uint16 if vocab_size <= 1 << 16 else np.int32
