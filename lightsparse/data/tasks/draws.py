"""The random choices of one example, from Philox's raw output, which NumPy keeps fixed between releases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from lightsparse.utils.hashing import mixed

T = TypeVar("T")


class Draws:
    """An endless stream of choices named by (seed, split, index): the same wherever and whenever it is opened.

    Streams of different names never overlap: each has a Philox key of its own (Salmon et al. 2011).
    """

    def __init__(self, seed: int, split: int, index: int):
        self._source = np.random.Philox(key=np.array([mixed(seed, split), index], dtype=np.uint64))

    def uniform(self, count: int) -> np.ndarray:
        """fp64 [count] in [0, 1)."""
        return (self._source.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int, count: int) -> np.ndarray:
        """int64 [count] in [0, limit), each independent."""
        return (self.uniform(count) * limit).astype(np.int64)

    def one_below(self, limit: int) -> int:
        return int(self.below(limit, 1)[0])

    def chance(self) -> float:
        return float(self.uniform(1)[0])

    def distinct(self, limit: int, count: int) -> np.ndarray:
        """int64 [count], `count` different numbers in [0, limit), in random order."""
        if 4 * count > limit:
            return np.argsort(self.uniform(limit), kind="stable")[:count]
        found: dict[int, None] = {}
        while len(found) < count:  # few of many: repetitions are rare
            found |= dict.fromkeys(self.below(limit, count).tolist())
        return np.array(list(found)[:count], dtype=np.int64)

    def weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
        """int64 [count], different indices drawn one after the other with chances ∝ weights [n] of those left.

        Efraimidis & Spirakis 2006: the largest of log(u) / weight.
        """
        return np.argsort(-np.log1p(-self.uniform(len(weights))) / weights, kind="stable")[:count]

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.one_below(len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [items[i] for i in self.distinct(len(items), len(items))]
