"""Log-spaced buckets of token counts: 0 … 15, 16 … 31, 32 … 63, … and sums over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST = 16  # tokens in the first bucket


def edges(longest: int) -> list[int]:
    """Ends of the buckets that hold 0 … longest − 1; the last end is `longest`."""
    inner = []
    end = FIRST
    while end < longest:
        inner.append(end)
        end *= 2
    return [*inner, longest]


def sums(values: Tensor, at: Tensor, ends: Sequence[int]) -> Tensor:
    """fp64 [buckets, columns]: values [n, columns] added up by the bucket of `at`, int64 [n], 0 ≤ at < ends[-1]."""
    bucket = torch.bucketize(at.contiguous(), torch.tensor(ends[:-1], dtype=torch.int64), right=True)
    return torch.zeros(len(ends), values.shape[1], dtype=torch.float64).index_add_(0, bucket, values.double())
