"""One call for a core's attention, whether all of the sequence is on this rank or only a part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.attention.core import SequenceContext
from lightsparse.context_parallel.attend import attend
from lightsparse.context_parallel.key_owners import Sources
from lightsparse.kernels import Dropout, block_sparse_attention, block_sparse_attention_with_lse
from lightsparse.patterns import BlockLayout
from lightsparse.patterns.parts import of_rows


@torch.compiler.disable  # cuts a table by its values: nothing to compile
def own_rows(layout: BlockLayout, ctx: SequenceContext) -> BlockLayout:
    """The rows of this rank's queries; all of them where no rank shares the sequence."""
    if ctx.shard is None:
        return layout
    shard = ctx.shard

    def cut() -> BlockLayout:
        return of_rows(layout, shard.split.blocks(shard.rank, layout.q_block).to(layout.kv_indices.device))

    return shard.plans.get(layout, "rows", cut)


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    ctx: SequenceContext,
    *,
    sources: Sources | None = None,
    kv_heads: int | None = None,
    ring: bool = False,
    block_bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """out [B, H, Nq, D]; `layout` holds the rows of the queries here (`own_rows`).

    sources, kv_heads and ring matter where ctx.shard is set: see lightsparse.context_parallel.attend.
    """
    if ctx.shard is None:
        return block_sparse_attention(q, k, v, layout, block_bias=block_bias, dropout=dropout)
    shard, bias = ctx.shard, block_bias
    return attend(
        q, k, v, layout, shard, sources=sources, kv_heads=kv_heads, ring=ring, block_bias=bias, dropout=dropout
    )[0]


def sharded_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    ctx: SequenceContext,
    *,
    sources: Sources | None = None,
    kv_heads: int | None = None,
    ring: bool = False,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """As `sharded_attention`, and the lse [B, H, Nq]."""
    if ctx.shard is None:
        return block_sparse_attention_with_lse(q, k, v, layout, dropout=dropout)
    shard = ctx.shard
    out, lse = attend(
        q, k, v, layout, shard, sources=sources, kv_heads=kv_heads, ring=ring, dropout=dropout, with_lse=True
    )
    return out, lse


def sequence_length(k: Tensor, ctx: SequenceContext) -> int:
    """Keys of the whole sequence, of which k [B, Hkv, n, D] may hold this rank's only, or those still in the cache.

    Raises ValueError where they are not this rank's.
    """
    if ctx.cached_block_ids is not None:
        return ctx.q_start + ctx.positions.shape[1]
    if ctx.shard is None:
        return k.shape[2]
    own = len(ctx.shard.tokens)
    if k.shape[2] != own:
        raise ValueError(
            f"k has {k.shape[2]} tokens; this rank holds {own} of the sequence's {ctx.shard.length}: cut them out with "
            "shard.take"
        )
    return ctx.shard.length
