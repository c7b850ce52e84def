"""Mean summaries of keys and values, appended as further keys: the data that a PooledHierarchy's layout is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lightsparse.context_parallel.key_owners import NOWHERE, Sources
from lightsparse.context_parallel.split import Split
from lightsparse.patterns import BlockLayout
from lightsparse.patterns.hierarchical import Segment

State = dict[str, Tensor]  # SequenceContext.states of one layer


def with_summaries(x: Tensor, segments: Sequence[Segment], block: int) -> Tensor:
    """Keys or values [B, H, N, D] → [B, H, keys of the layout, D]: tokens, then each level's means, zeros in between.

    A mean is taken in fp32 (fp64 for fp64), of the finer level's means, which stand for equally many tokens each.
    Differentiable. Without a level of summaries x is returned as it is.
    """
    if len(segments) < 2:
        return x
    parts, means = [_padded(x, block)], x
    for finer, level in pairwise(segments):
        of = level.stride // finer.stride
        means = means[:, :, : level.count * of].unflatten(2, (level.count, of)).mean(3, dtype=_precise(x.dtype))
        parts.append(_padded(means.to(x.dtype), block))
    return torch.cat(parts, dim=2)


def with_kept_summaries(
    k: Tensor, v: Tensor, length: int, strides: Sequence[int], segments: Sequence[Segment], block: int, state: State
) -> tuple[Tensor, Tensor]:
    """`with_summaries` of k and v [B, Hkv, n, D] while decoding: means of tokens that may be gone come from `state`.

    length   tokens read so far; k and v end with the last of them
    strides  of all levels of summaries, finest first: a level is kept before it is read
    state    what the passes before left there; takes in the means that have become complete
    Raises ValueError where tokens of a new mean are gone, because `state` is not that of the tokens before.
    """
    both = []
    for name, x in (("keys", k), ("values", v)):
        finer, finer_stride, parts = x, 1, [_padded(x, block)]
        for level, stride in enumerate(strides, start=1):
            of, kept = stride // finer_stride, state.get(f"{name}_{level}")
            done = 0 if kept is None else kept.shape[2]
            if length // stride > done:
                # Counted from the end, where x and the finer means are whole.
                first = finer.shape[2] - (length // finer_stride - done * of)
                if first < 0:
                    raise ValueError(
                        f"the cache has forgotten tokens of a summary of {stride} that the state of {length} tokens "
                        "lacks; decode with the states of the passes that read those tokens, one KVCache per layer"
                    )
                complete = (length // stride - done) * of
                new = finer[:, :, first : first + complete].detach().unflatten(2, (-1, of))
                means = new.mean(3, dtype=_precise(x.dtype))
                kept = means if kept is None else torch.cat([kept, means], 2)
                state[f"{name}_{level}"] = kept
            if kept is None:
                break
            if level < len(segments):
                parts.append(_padded(kept[:, :, : segments[level].count].to(x.dtype), block))
            finer, finer_stride = kept, stride
        both.append(torch.cat(parts, dim=2) if len(segments) > 1 else x)
    return both[0], both[1]


def own_segments(tokens: Tensor, segments: Sequence[Segment], block: int) -> tuple[Segment, ...]:
    """The levels over some tokens of a sequence, whole strides in ascending order: what `with_summaries` makes of them.

    segments  those of the whole sequence; a level keeps its place though it may have no summary here
    """
    own: list[Segment] = []
    for level in segments:
        ids = tokens[: len(tokens) - len(tokens) % level.stride : level.stride] // level.stride
        first = own[-1].first_block + -(-own[-1].count // block) if own else 0
        own.append(replace(level, count=int((ids < level.count).sum()), first_block=first))
    return tuple(own)


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
        own = own_segments(tokens, segments, block)
        for level, here in zip(segments, own, strict=True):
            keys = level.first_block * block + tokens[:: level.stride][: here.count] // level.stride
            rank_of[keys] = rank
            row_of[keys] = here.first_block * block + torch.arange(here.count)
        rows_of_rank.append(_rows(own, block))
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
