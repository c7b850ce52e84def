"""One call for a core's attention, whether all of the sequence is on this rank or only a part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.attention.core import SequenceContext
from lightsparse.kernels import Dropout, block_sparse_attention
from lightsparse.parallel.attend import Plans, attend
from lightsparse.parallel.sources import Sources
from lightsparse.patterns import BlockLayout
from lightsparse.patterns.parts import of_rows


def own_rows(layout: BlockLayout, ctx: SequenceContext) -> BlockLayout:
    """The rows of this rank's queries; all of them where no rank shares the sequence."""
    if ctx.shard is None:
        return layout
    plans, key = plans_of(ctx), ("rows", layout)
    if key not in plans:
        with torch.inference_mode(False):  # first made in an evaluation, it must serve training too
            blocks = ctx.shard.split.blocks(ctx.shard.rank, layout.q_block)
            plans[key] = of_rows(layout, blocks.to(layout.kv_indices.device))
    return plans[key]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    ctx: SequenceContext,
    *,
    plans: Plans | None = None,
    sources: Sources | None = None,
    kv_heads: int | None = None,
    ring: bool = False,
    block_bias: Tensor | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out [B, H, Nq, D] and the lse (None unless asked for); `layout` holds the rows of the queries here (`own_rows`).

    plans, sources, kv_heads and ring matter where ctx.shard is set: see lightsparse.parallel.attend.
    """
    if ctx.shard is not None:
        return attend(
            q,
            k,
            v,
            layout,
            ctx.shard,
            plans=plans,
            sources=sources,
            kv_heads=kv_heads,
            ring=ring,
            block_bias=block_bias,
            dropout=dropout,
            return_lse=return_lse,
        )
    found = block_sparse_attention(q, k, v, layout, block_bias=block_bias, dropout=dropout, return_lse=return_lse)
    return found if isinstance(found, tuple) else (found, None)


def plans_of(ctx: SequenceContext) -> Plans:
    """Where plans for layouts without documents live as long as the split, and others as long as the pass."""
    return ctx.shard.plans if ctx.shard is not None and ctx.documents is None else ctx.layouts


def sequence_length(k: Tensor, ctx: SequenceContext) -> int:
    """Keys of the whole sequence, of which k [B, Hkv, n, D] may hold this rank's only."""
    return k.shape[2] if ctx.shard is None else ctx.shard.length
