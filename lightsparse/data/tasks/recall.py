"""H3's associative recall: pairs of a key and its value, then one of the keys: what was its value?

Fu et al. 2023, arXiv 2212.14052, section 3.1. Symbols 0 … s − 1 are keys, s … 2s − 1 values, the last id is a mark that
stands before the asked key, with s = (vocabulary − 1) // 2. In each example every key has one value, drawn with
repetition, so that guessing is right in 1 of s cases: 25% with the vocabulary of 10, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.task import Example, TaskConfig, no_labels


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(TaskConfig):
    """data.context tokens: pairs, mark, key; asked is the last label. An odd context starts with a mark."""

    context: int = 40
    batch_size: int = 32
    examples: int = 5000
    loss: Literal["answer", "all"] = "all"
    vocabulary: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 3:
            raise ValueError(f"data.vocabulary is {self.vocabulary}; a key, a value and the mark need at least 3")
        if self.context < 4:
            raise ValueError(f"data.context is {self.context}; one pair, the mark and a key need at least 4 tokens")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def example(self, draws: Draws) -> Example:
        symbols, pairs = (self.vocabulary - 1) // 2, (self.context - 2) // 2
        mark = self.vocabulary - 1
        value_of = symbols + draws.below(symbols, symbols)
        keys = draws.below(symbols, pairs)
        asked = int(keys[draws.one_below(pairs)])
        text = np.stack([keys, value_of[keys]], axis=1).reshape(-1)
        head = np.full(self.context % 2, mark, dtype=np.int64)
        tokens = np.concatenate([head, text, np.array([mark, asked])])
        labels, evidence = no_labels(self.context)
        labels[:-1], labels[-1] = tokens[1:], value_of[asked]
        nearest = len(head) + 2 * int(np.flatnonzero(keys == asked)[-1])  # the key again; its value stands behind it
        evidence[-1] = self.context - 1 - nearest
        return Example(tokens, labels, evidence)
