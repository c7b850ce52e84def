"""Mean summaries of keys and values, appended as further keys: the data that a PooledHierarchy's layout is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lightsparse.parallel.sources import NOWHERE, Sources
from lightsparse.parallel.split import Split
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


def own_segments(tokens: Tensor, segments: Sequence[Segment], block: int) -> tuple[Segment, ...]:
    """The levels over some tokens of a sequence, whole strides in ascending order: what `with_summaries` makes of them.

    segments  those of the whole sequence; a level keeps its place though it may have no summary here
    """
    found: list[Segment] = []
    for level in segments:
        ids = tokens[: len(tokens) - len(tokens) % level.stride : level.stride] // level.stride
        first = found[-1].first_block + -(-found[-1].count // block) if found else 0
        found.append(replace(level, count=int((ids < level.count).sum()), first_block=first))
    return tuple(found)


def summary_sources(split: Split, segments: Sequence[Segment], block: int, device: torch.device) -> Sources:
    """Which rank holds each key of the layout, tokens and summaries, in the form that `with_summaries` gives them.

    A summary is with its tokens: strides divide the split's unit.
    """
    total = _rows(segments, block)
    rank_of = torch.full((total,), NOWHERE)
    row_of = torch.zeros(total, dtype=torch.int64)
    rows_of_rank = []
    for rank in range(split.world):
        tokens = split.tokens(rank)
        held = own_segments(tokens, segments, block)
        for level, here in zip(segments, held, strict=True):
            keys = level.first_block * block + tokens[:: level.stride][: here.count] // level.stride
            rank_of[keys] = rank
            row_of[keys] = here.first_block * block + torch.arange(here.count)
        rows_of_rank.append(_rows(held, block))
    return Sources(rank_of.to(device)[None], row_of.to(device)[None], tuple(rows_of_rank))


def _rows(segments: Sequence[Segment], block: int) -> int:
    """Rows that `with_summaries` gives: whole blocks, but tokens alone stay as they are."""
    last = segments[-1]
    return (last.first_block + -(-last.count // block)) * block if len(segments) > 1 else last.count


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
