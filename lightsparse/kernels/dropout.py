"""Dropout of attention weights as a pure function of where a weight stands.

No generator state is consumed: the decision for (sample, head, query, key) is a hash of the key of the pass and those
four numbers. So recomputation, ranks, resharding and backends agree bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """The 64-bit pattern x as torch's int64, whose products wrap around."""
    return x - (1 << 64) if x >= 1 << 63 else x


# Odd 64-bit constants of splitmix64 (Steele et al. 2014) and xxHash64.
_A, _B = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_HEAD, _QUERY, _KEY = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
_BITS = 31


@dataclass(frozen=True, eq=False)
class Dropout:
    """rate: share of weights dropped, in [0, 1). keys: int64 [B], one per sample (`sample_keys`)."""

    rate: float
    keys: Tensor

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"dropout rate is {self.rate}; it is a share of the weights and must lie in [0, 1)")


def sample_keys(seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    """One int64 key per sample from (seed of the pass, layer, global sample id): int64 [B]."""
    digest = hashlib.blake2b(f"{seed}/{layer}".encode(), digest_size=8).digest()
    return _mix(sample_ids.long() * _HEAD + int.from_bytes(digest, "little", signed=True))


def keep_scale(dropout: Dropout, heads: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (1 − rate) where a weight stays, 0 where it is dropped.

    heads [H]: query heads; queries: positions [B|1, Q]; keys: key numbers [B|1, H|1, K]. Returns [B, H, Q, K].
    """
    row_BH = dropout.keys[:, None] + heads * _HEAD
    row_BHQ = _mix(row_BH[:, :, None] + queries.long()[:, None, :] * _QUERY)
    key_BHK = _mix(keys.long() * _KEY)
    bits = _mix(row_BHQ[..., None] ^ key_BHK[:, :, None, :])
    kept = ((bits >> 20) & ((1 << _BITS) - 1)) >= int(dropout.rate * (1 << _BITS))
    return kept.to(dtype) * (1.0 / (1.0 - dropout.rate))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; shifts are arithmetic here, which keeps it one function on every device."""
    x = (x ^ (x >> 30)) * _A
    x = (x ^ (x >> 27)) * _B
    return x ^ (x >> 31)
