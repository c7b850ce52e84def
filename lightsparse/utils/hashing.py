"""Randomness without a generator: a hash of the numbers that name a decision, the same on every device, rank and run.

Nothing is consumed, so recomputation, resuming, resharding and backends agree bit for bit. The mixing function is the
finaliser of SplitMix64 (Steele et al. 2014, doi 10.1145/2714064.2660195).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
M1, M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mixed(*numbers: int) -> int:
    """One well-spread integer in [0, 2⁶³) from several: SplitMix64 chained over them."""
    state = 0
    for number in numbers:
        state = (state + number + _GAMMA) & _WORD
        state = ((state ^ (state >> 30)) * M1) & _WORD
        state = ((state ^ (state >> 27)) * M2) & _WORD
        state ^= state >> 31
    return state >> 1


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors; products wrap around, shifts are made logical by the masks."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * signed(M1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * signed(M2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def chain(key: Tensor | int, *numbers: Tensor) -> Tensor:
    """Int64 bits of (key, numbers…), all broadcast together: every number is mixed in before the next is added."""
    state = key if isinstance(key, Tensor) else torch.tensor(key, device=numbers[0].device)
    for number in numbers:
        state = mix(state + number.long() * signed(_GAMMA) + 1)
    return state


def uniform(bits: Tensor) -> Tensor:
    """Fp32 in [0, 1) from the upper 24 bits of int64 hashes."""
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def signed(word: int) -> int:
    """The 64-bit pattern `word` as torch's int64."""
    return word - (1 << 64) if word >> 63 else word
