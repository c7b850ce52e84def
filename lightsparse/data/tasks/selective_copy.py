"""Selective copying: symbols lie scattered in noise, and are to be reproduced in their order.

Gu & Dao 2023 (Mamba), arXiv 2312.00752, section 4.1.1: 16 symbols in 4096 tokens, vocabulary 16. Id 0 is the noise,
id 1 the mark under which an answer is asked, the others are the symbols.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.task import Example, TaskConfig, no_labels

_NOISE, _MARK = 0, 1


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(TaskConfig):
    """data.context tokens, the last `symbols` of which are marks; the i-th mark's label is the i-th symbol."""

    batch_size: int = 8
    vocabulary: int = 16
    symbols: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 3:
            raise ValueError(f"data.vocabulary is {self.vocabulary}; noise, mark and a symbol need at least 3")
        if self.symbols < 1:
            raise ValueError(f"data.symbols is {self.symbols}; it counts what is to be copied and must be at least 1")
        if self.context < 2 * self.symbols:
            raise ValueError(
                f"data.context is {self.context} and data.symbols {self.symbols}; symbols and marks take "
                f"{2 * self.symbols} tokens: raise data.context"
            )
        if self.loss != "answer":
            raise ValueError("data.loss is all, but noise cannot be predicted; use data.loss=answer")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def example(self, draws: Draws) -> Example:
        text = self.context - self.symbols
        places = np.sort(draws.distinct(text, self.symbols))
        symbols = 2 + draws.below(self.vocabulary - 2, self.symbols)
        tokens = np.full(self.context, _NOISE, dtype=np.int64)
        tokens[places], tokens[text:] = symbols, _MARK
        labels, evidence = no_labels(self.context)
        labels[text:] = symbols
        evidence[text:] = np.arange(text, self.context) - places
        return Example(tokens, labels, evidence)
