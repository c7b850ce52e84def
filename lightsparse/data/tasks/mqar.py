"""Multi-query associative recall: pairs of a key and its value, then every key again somewhere: what was its value?

Arora et al. 2023 (Zoology), arXiv 2312.04927, section 4. Keys are the first half of the vocabulary, values the second.
The gap between the pairs and a key's return follows a power law, chance ∝ gap^(a − 1). All other places hold random
symbols: with one symbol repeated there instead, training stays on a plateau for long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.task import Example, TaskConfig, no_labels


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecall(TaskConfig):
    """data.context tokens: `pairs` pairs, then `pairs` asked keys among others; asked is the label of each."""

    context: int = 64
    batch_size: int = 512
    vocabulary: int = 8192
    pairs: int = 4
    power: float = 0.01  # a: the smaller, the nearer to the pairs the questions stand
    fill: Literal["random", "zeros"] = "random"  # of places without a question; zeros: symbol 0, then no key is 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1:
            raise ValueError(f"data.pairs is {self.pairs}; it counts keys with a value and must be at least 1")
        if self.vocabulary // 2 - 1 < self.pairs:
            raise ValueError(
                f"data.vocabulary is {self.vocabulary}, of which half are keys, and data.pairs {self.pairs}; "
                f"use a vocabulary of at least {2 * (self.pairs + 1)}"
            )
        if self.context < 3 * self.pairs:
            raise ValueError(
                f"data.context is {self.context} and data.pairs {self.pairs}; pairs and questions take "
                f"{3 * self.pairs} tokens: raise data.context"
            )
        if self.power <= 0:
            raise ValueError(f"data.power is {self.power}; it is the exponent of a power law and must be above 0")
        if self.fill not in ("random", "zeros"):
            raise ValueError(f"data.fill is {self.fill!r}; it must be random or zeros")
        if self.loss != "answer":
            raise ValueError("data.loss is all, but what follows an asked key is no answer here; use data.loss=answer")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def example(self, draws: Draws) -> Example:
        half, pairs = self.vocabulary // 2, self.pairs
        keys = 1 + draws.distinct(half - 1, pairs)
        values = half + draws.below(self.vocabulary - half, pairs)
        gaps = np.arange(1, self.context - 2 * pairs + 1)
        asked = 2 * pairs + draws.weighted(gaps ** (self.power - 1), pairs)
        tokens = np.zeros(self.context, dtype=np.int64)
        if self.fill == "random":
            tokens = draws.below(self.vocabulary, self.context)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        tokens[asked] = keys
        labels, evidence = no_labels(self.context)
        labels[asked] = values
        evidence[asked] = asked - 2 * np.arange(pairs)
        return Example(tokens, labels, evidence)
