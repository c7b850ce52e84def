"""Mean summaries of keys and values, appended as further keys: the data that a PooledHierarchy's layout is about."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightsparse.patterns import BlockLayout
from lightsparse.patterns.hierarchical import Segment


def with_summaries(x: Tensor, segments: Sequence[Segment], block: int) -> Tensor:
    """Keys or values [B, H, N, D] → [B, H, keys of the layout, D]: tokens, then each level's means, zeros in between.

    A mean is taken in fp32 (fp64 for fp64), of the finer level's means, which stand for equally many tokens each.
    Differentiable. Without a level of summaries x comes back as it is.
    """
    if len(segments) < 2:
        return x
    parts, means = [_padded(x, block)], x
    for finer, level in pairwise(segments):
        of = level.stride // finer.stride
        means = means[:, :, : level.count * of].unflatten(2, (level.count, of)).mean(3, dtype=_precise(x.dtype))
        parts.append(_padded(means.to(x.dtype), block))
    return torch.cat(parts, dim=2)


def log_counts(layout: BlockLayout, segments: Sequence[Segment], dtype: torch.dtype) -> Tensor:
    """log(tokens that one key stands for) of each block in the layout's table: [B|1, 1, NQ, K], 0 for tokens.

    In fp32, or fp64 for inputs of fp64.
    """
    starts = torch.tensor([level.first_block for level in segments[1:]], device=layout.kv_indices.device)
    strides = torch.tensor([level.stride for level in segments], dtype=_precise(dtype), device=starts.device)
    return strides.log()[torch.bucketize(layout.kv_indices.long(), starts, right=True)]


def _precise(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _padded(x: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))
