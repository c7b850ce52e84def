"""Attention of queries that each have a list of key blocks of their own, a part of the queries at a time.

The lists of a long sequence are never all in memory: those of a part are chosen, used, dropped, and chosen again for
the backward pass.

Shapes: B batch, H query heads, S heads that choose, n queries of this pass, R of a part, D head dim, K entries of a
list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import SequenceContext
from lightsparse.attention.sharded_call import sharded_attention
from lightsparse.kernels import Dropout, chunk_sizes
from lightsparse.patterns import BlockLayout, ElementMask, interval_mask
from lightsparse.patterns.layout import no_dense_rows

_TABLE, _WIDE_TABLE = 1 << 24, 1 << 26  # entries of the lists in memory at once; the second where chunks are wide


class BlockSelection(NamedTuple):
    layout: BlockLayout


class RowPart(NamedTuple):
    """Of some queries."""

    out: Tensor  # [B, H, R, D]
    computed: Tensor  # [B, S]: query–key area of the tiles read
    dense: Tensor  # [B|1]: and of dense attention's
    choice: Tensor  # int32 [B, S, rows, K]: the lists of the last token of every block


def row_layout(
    choose: Callable[[Tensor], Tensor], queries: int, first: int, length: int, block: int, ctx: SequenceContext
) -> tuple[BlockLayout, Tensor]:
    """What some queries read, and their places in the sequence of `length` tokens, int64 [queries].

    choose  from those places to the lists, int32 [B, S, queries, K]
    first   place of the first of the queries, behind which the others follow; with ctx.shard they are this rank's
    """
    device = ctx.positions.device
    if ctx.shard is None:
        n, tokens = first + queries, torch.arange(first, first + queries, device=device)
    else:
        n, tokens = length, ctx.shard.tokens.to(device)
    documents = None if ctx.documents is None else ctx.documents[:, :n]
    mask = interval_mask(n, documents=documents, device=device).of_queries(tokens)
    return BlockLayout(choose(tokens), 1, block, mask, no_dense_rows(device)), tokens


def attend_in_parts(
    layout_of: Callable[[slice], tuple[BlockLayout, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    entries: int,
    block: int,
    length: int,
    ctx: SequenceContext,
    dropout: Dropout | None,
) -> RowPart:
    """q [B, H, n, D] over what `layout_of` says of a slice of them, see row_layout; all parts together.

    entries  of the lists of one query, over samples and heads
    length   tokens of the sequence
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, part: slice) -> RowPart:
        layout, tokens = layout_of(part)
        out = sharded_attention(q, k, v, layout, ctx, dropout=dropout)
        rows = block_ends(tokens, ctx.q_start + part.start, block, length, ctx)
        return RowPart(out, *layout.areas(), layout.kv_indices[:, :, rows])

    parts = []
    for part in row_parts(q.shape[2], entries, block, chunk_sizes.at_once(q.device, _TABLE, _WIDE_TABLE), ctx):
        keys = k.shape[2] if part.stop == q.shape[2] else ctx.q_start + part.stop  # up to the last query's own
        arguments = (q[:, :, part], k[:, :, :keys], v[:, :, :keys], part)
        if torch.is_grad_enabled() and part.stop - part.start < q.shape[2]:
            parts.append(checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(attend(*arguments))
    if len(parts) == 1:
        return parts[0]
    out, computed, dense, choice = zip(*parts, strict=True)
    return RowPart(torch.cat(out, 2), torch.stack(computed).sum(0), torch.stack(dense).sum(0), torch.cat(choice, 2))


def row_parts(queries: int, entries: int, block: int, most: int, ctx: SequenceContext) -> list[slice]:
    """Whole blocks of queries, whose lists of `entries` entries each are together no longer than `most`.

    Ranks that share a sequence take all of their queries at once, so that they stay in step.
    """
    return slices(queries, queries if ctx.shard is not None else max(most // max(entries, 1) // block, 1) * block)


def block_ends(tokens: Tensor, first: int, block: int, length: int, ctx: SequenceContext) -> Tensor:
    """Which of some queries at `tokens`, the first of them at `first`, are the last ones of a block: int64."""
    if ctx.shard is not None:
        return ((tokens % block == block - 1) | (tokens == length - 1)).nonzero().flatten()
    stop = first + len(tokens)  # neighbours: known without a look at them
    row = -(first + 1) % block
    rows = torch.arange(row, max(row, len(tokens)), block, device=tokens.device)
    if stop == length and length % block:
        rows = torch.cat([rows, rows.new_full((1,), len(tokens) - 1)])
    return rows


def slices(count: int, at_once: int) -> list[slice]:
    """0 … count − 1, `at_once` at a time."""
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def single_rows(table: Tensor, mask: ElementMask) -> BlockLayout:
    """Rows of single queries that read single keys, those of a table [B, R, K]."""
    return BlockLayout(table[:, None], 1, 1, mask, no_dense_rows(table.device))
