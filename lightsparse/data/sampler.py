"""The order of training samples: a pure function of (seed, epoch, index), whatever the number of ranks.

The state of training data is one number, the samples consumed by all ranks together. A run that continues from it, on
as many ranks, workers and samples per batch as it likes, sees the very samples that an uninterrupted run would.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
from torch.utils.data import Sampler


class GlobalOrderSampler(Sampler[int]):
    """Endless sample ids of one rank: positions start + rank, start + rank + world, … of the global order.

    Position p is sample epoch_order(seed, p // num_samples)[p % num_samples]; its id is epoch · num_samples + index.
    """

    def __init__(self, num_samples: int, seed: int, *, start: int = 0, rank: int = 0, world: int = 1):
        self.num_samples, self.seed, self.start, self.rank, self.world = num_samples, seed, start, rank, world

    def __iter__(self) -> Iterator[int]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for position in count(self.start + self.rank, self.world):
            epoch, place = divmod(position, self.num_samples)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.num_samples, self.seed, epoch), epoch
            yield epoch * self.num_samples + int(order[place])


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation, int64 [num_samples]: the samples sorted by a random key each.

    Keys are Philox's raw output, which NumPy keeps fixed between releases; Generator.permutation it does not.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_samples)
    return np.argsort(keys, kind="stable")
