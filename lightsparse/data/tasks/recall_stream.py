"""Recall in a stream: pairs of a key and its value, one after the other; where a key comes again: what was its value?

Multi-query associative recall as Arora et al. 2023 (Zoology), arXiv 2312.04927, section 4, define it over a whole text:
a token that has stood there before is followed by what followed it then. Every return of a key is a question, so that a
text asks many; and a key returns after a least distance, so that no window shorter than that finds an answer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.task import Example, TaskConfig


@dataclass(frozen=True, kw_only=True)
class RecallStream(TaskConfig):
    """data.context tokens, key, value, key, value …; `pairs` keys, each with one value throughout its text.

    Ids below vocabulary // 2 are keys, the others values. The next key is drawn from those that have not stood there
    for `nearest` tokens: an answer is nearest, nearest + 2, … tokens away, with chances that fall geometrically, by
    1 / (keys that may come) per pair.
    """

    context: int = 512
    batch_size: int = 8
    vocabulary: int = 128
    pairs: int = 64  # keys with a value in a text
    nearest: int = 96  # tokens from a key back to the same key at least
    # Training examples have from here to `pairs` keys, log-uniformly, and return the nearer the fewer they are; what is
    # scored has `pairs`. Few keys teach to compare at all, which then serves for many. None: all have `pairs`
    fewest: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1:
            raise ValueError(f"data.pairs is {self.pairs}; it counts keys with a value and must be at least 1")
        if self.vocabulary // 2 < self.pairs:
            raise ValueError(
                f"data.vocabulary is {self.vocabulary}, of which half are keys, and data.pairs {self.pairs}; "
                f"use a vocabulary of at least {2 * self.pairs}"
            )
        if not 2 <= self.nearest <= 2 * self.pairs:
            raise ValueError(
                f"data.nearest is {self.nearest}; {self.pairs} keys of 2 tokens with their value return after at most "
                f"{2 * self.pairs} and at least 2: lower data.nearest or raise data.pairs"
            )
        if self.fewest is not None and not 1 <= self.fewest <= self.pairs:
            raise ValueError(
                f"data.fewest is {self.fewest}; the keys of the easiest training example are at least 1 and at most "
                f"data.pairs, which is {self.pairs}; null for no easier ones"
            )
        if self.context < 2 * self.pairs + self.nearest:
            raise ValueError(
                f"data.context is {self.context}; {self.pairs} pairs and a return of all of them after "
                f"{self.nearest} tokens take {2 * self.pairs + self.nearest}: raise data.context"
            )

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def example(self, draws: Draws) -> Example:
        return self._with_keys(self.pairs, draws)

    def training_example(self, draws: Draws) -> Example:
        fewest = self.fewest or self.pairs
        return self._with_keys(round(fewest * (self.pairs / fewest) ** draws.chance()), draws)

    def _with_keys(self, pairs: int, draws: Draws) -> Example:
        half = self.vocabulary // 2
        keys = draws.distinct(half, pairs)
        values = half + draws.below(self.vocabulary - half, pairs)
        order = self._order(pairs, draws)
        text = np.stack([keys[order], values[order]], 1).ravel()  # a token longer than the example: the last label
        labels = text[1 : self.context + 1]
        evidence = np.full(self.context, -1, dtype=np.int64)
        evidence[::2] = 2 * _since_last(order)[: len(evidence[::2])]
        evidence[evidence < 0] = -1
        return Example(text[: self.context], labels, evidence)

    def _order(self, pairs: int, draws: Draws) -> np.ndarray:
        """Which pair stands where, int64 [context // 2 + 1]."""
        nearest = self.nearest * pairs / self.pairs  # as near for the number of keys as it is for all
        ready, resting, order = list(range(pairs)), deque[int](), []
        for chance in draws.uniform(self.context // 2 + 1).tolist():
            place = int(chance * len(ready))
            ready[place], ready[-1] = ready[-1], ready[place]
            order.append(ready.pop())
            resting.append(order[-1])
            if 2 * len(resting) >= nearest:
                ready.append(resting.popleft())
        return np.array(order, dtype=np.int64)


def _since_last(order: np.ndarray) -> np.ndarray:
    """How many entries ago the same number stood last, −1 where it is there for the first time: int64 [n]."""
    last: dict[int, int] = {}
    found = []
    for place, number in enumerate(order.tolist()):
        found.append(place - last[number] if number in last else -1)
        last[number] = place
    return np.array(found, dtype=np.int64)
