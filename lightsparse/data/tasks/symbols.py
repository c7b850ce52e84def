"""Tasks over symbols: token ids that stand for nothing but themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightsparse.data.tokens import Additive


@dataclass(frozen=True)
class SymbolTokenizer(Additive):
    """Numbers as tokens, written with spaces between them; `names` writes some of them otherwise.

    `bos` and `mask` are −1, which no text holds: a task's examples have neither.
    """

    vocab_size: int
    names: tuple[str, ...] = ()  # of the first ids
    bos: int = -1
    mask: int = -1

    @property
    def fingerprint(self) -> str:
        return f"symbols-{self.vocab_size}"

    def encode(self, text: str) -> np.ndarray:
        """int64 [symbols]. Raises ValueError for a word that is no symbol."""
        ids = {self.decode([i]): i for i in range(self.vocab_size)}
        unknown = [word for word in text.split() if word not in ids]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of this task's {self.vocab_size} symbols")
        return np.array([ids[word] for word in text.split()], dtype=np.int64)

    def decode(self, ids: Tensor | np.ndarray | Sequence[int]) -> str:
        return " ".join(self.names[i] if i < len(self.names) else str(i) for i in np.asarray(ids).tolist())

    def token_bytes(self) -> Tensor:
        """int64 [vocab], all 0: symbols stand for no text, so that there are no bits per byte."""
        return torch.zeros(self.vocab_size, dtype=torch.int64)
