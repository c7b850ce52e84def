"""Dropout of attention weights as a pure function of where a weight stands.

No generator state is consumed: the decision for (sample, head, query, key) is a hash of the key of the pass and those
four numbers. So recomputation, ranks, resharding and backends agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.utils.hashing import chain, mix, mixed, signed

_KEY = signed(0x165667B19E3779F9)  # an odd constant of xxHash64
_BITS = 31


@dataclass(frozen=True, eq=False)
class Dropout:
    """rate: share of weights dropped, in [0, 1). keys: int64 [B], one per sample (`sample_keys`).

    key_ids: int64 [Nkv], the numbers that a call's keys go by where they are a part of a sequence's; None = 0, 1, …
    """

    rate: float
    keys: Tensor
    key_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"dropout rate is {self.rate}; it is a share of the weights and must lie in [0, 1)")


def sample_keys(seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    """One int64 key per sample from (seed of the pass, layer, global sample id): int64 [B]."""
    return chain(mixed(seed, layer), sample_ids)


def keep_scale(dropout: Dropout, heads: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (1 − rate) where a weight stays, 0 where it is dropped.

    heads [H]: query heads; queries: positions [B|1, Q]; keys: key numbers [B|1, H|1, K]. Returns [B, H, Q, K].
    """
    row_BHQ = row_hashes(dropout.keys[:, None, None], heads[None, :, None], queries[:, None, :])
    return kept(dropout.rate, row_BHQ[..., None], key_hashes(dropout, keys)[:, :, None, :], dtype)


def row_hashes(sample_keys: Tensor, heads: Tensor, queries: Tensor) -> Tensor:
    """A hash for each row of weights; the three broadcast."""
    return chain(sample_keys, heads, queries)


def key_hashes(dropout: Dropout, keys: Tensor) -> Tensor:
    """A hash for each key number: once per key, so that only one mix is left for every pair."""
    if dropout.key_ids is not None:  # what fills up a last, short block is nobody's key
        keys = dropout.key_ids[keys.long().clamp(max=len(dropout.key_ids) - 1)]
    return mix(keys.long() * _KEY)


def kept(rate: float, rows: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (1 − rate) or 0 for each pair of two hashes, which broadcast."""
    bits = mix(rows ^ keys)
    stays = ((bits >> 20) & ((1 << _BITS) - 1)) >= drop_below(rate)
    return stays.to(dtype) * (1.0 / (1.0 - rate))


def drop_below(rate: float) -> int:
    """Of the 2³¹ values of a weight's bits, those below this one drop it."""
    return int(rate * (1 << _BITS))
