"""Attention of this rank's queries over a sequence that many ranks hold: exact, with the keys that its rows name.

Rows that read only keys of their own rank are computed while the others' keys are on their way.

Shapes: B samples, H query heads, Hkv key/value heads, Z = B · Hkv, n tokens of this rank, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightsparse.context_parallel.exchange import Fetch, RowExchange, plan_exchange
from lightsparse.context_parallel.key_owners import NOWHERE, Sources, as_table, from_table, token_sources
from lightsparse.context_parallel.ring import RingPlan, plan_ring, ring_attention
from lightsparse.context_parallel.shard import ContextShard, most_over
from lightsparse.kernels import Dropout, block_sparse_attention, block_sparse_attention_with_lse
from lightsparse.patterns import BlockLayout
from lightsparse.patterns.parts import members, named_blocks, of_keys, of_rows

_MOST_SHARES = 4  # auto: ranks' shares of the sequence that a rank may fetch before the ring is taken instead


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a layout, with keys renumbered."""

    rows: Tensor  # query blocks, int64
    queries: Tensor  # int64
    layout: BlockLayout
    key_ids: Tensor  # numbers of the keys in the whole sequence, int64


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """How one rank serves a layout.

    near      rows that read only this rank's keys, against those; None where there are none, and with exchange=gather
    far       the other rows, against the keys that they name; None where there are none
    exchange  brings the keys of `far`; every rank takes part, whether it wants any or not
    """

    near: Part | None
    far: Part | None
    exchange: RowExchange
    side_by_side: bool  # the form of its tables (Sources)
    held: int  # keys that it brings for each sample and head


@torch.compiler.disable  # plans are made by values, and collectives must come in the order of the program
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    shard: ContextShard,
    *,
    sources: Sources | None = None,
    kv_heads: int | None = None,
    ring: bool = False,
    block_bias: Tensor | None = None,
    dropout: Dropout | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, ...]:
    """Like block_sparse_attention over the whole sequence, restricted to this rank's rows. All ranks call it together.

    q           [B, H, n, D]; k, v [B, Hkv, m, D]: this rank's own
    layout      this rank's query blocks against all keys of the sequence (`of_rows`)
    sources     who holds the keys; None: they are the tokens, split as the sequence is
    kv_heads    key/value heads of the layout, where `sources` pick some of those of k and v; None = those
    ring        whether the ring may be used: fixed layouts over tokens, without a bias
    Memory: keys and values of the blocks that this rank's rows name, those of any sample and head, for all of them. So
    it falls with the ranks for fixed patterns; where samples and heads choose differently the union may be everything,
    though each only fetches its own.
    Returns out [B, H, n, D] and, if asked for, the lse [B, H, n]; differentiable in q, k, v and the bias of every rank.
    Raises ValueError for exchange=ring where it cannot be used.
    """
    if shard.exchange == "ring" and not ring:
        raise ValueError("strategy.key_exchange is ring, which this attention cannot use; use sparse")
    heads = Heads(q.shape[0], q.shape[1], k.shape[1] if kv_heads is None else kv_heads)
    plan = shard.plans.get(layout, (sources, heads, ring), lambda: _plan(layout, sources, shard, heads, ring))
    if isinstance(plan, RingPlan):
        return ring_attention(q, k, v, plan, shard, dropout)[: 1 + with_lse]

    fetch = Fetch(plan.exchange, as_table(k, v, side_by_side=plan.side_by_side), shard, "keys")
    parts = []
    if plan.near is not None:
        parts.append((plan.near, _compute(q, k, v, plan.near, block_bias, dropout, with_lse)))
    fetched = from_table(fetch.result(), plan.side_by_side, heads.batch, heads.kv)
    if plan.far is not None:
        far_k, far_v = fetched.split(k.shape[-1], dim=-1)
        parts.append((plan.far, _compute(q, far_k, far_v, plan.far, block_bias, dropout, with_lse)))
    out, *lse = _together(parts) if parts else _nothing(q, with_lse)
    if plan.far is None:  # other ranks wait for this one's part in the backward, though it has fetched nothing
        out = _Tied.apply(out, fetched)
    return out, *lse


class Heads(NamedTuple):
    batch: int
    q: int
    kv: int


def _plan(
    layout: BlockLayout, sources: Sources | None, shard: ContextShard, heads: Heads, ring: bool
) -> KeyPlan | RingPlan:
    if layout.mask.dense is not None:
        raise ValueError("mask.dense is set; a sequence over several ranks takes none, use strategy=ddp")
    if shard.exchange == "ring":
        return plan_ring(layout, shard)
    plan = _plan_keys(layout, sources, shard, heads)
    if shard.exchange == "auto" and ring:
        held = plan.held / (shard.length / shard.world)
        if most_over(held, shard, layout.kv_indices.device) > _MOST_SHARES:  # the same decision on all ranks
            return plan_ring(layout, shard)
    return plan


def _plan_keys(layout: BlockLayout, sources: Sources | None, shard: ContextShard, heads: Heads) -> KeyPlan:
    device, block = layout.kv_indices.device, layout.kv_block
    near, rows = None, torch.arange(layout.num_q_blocks, device=device)
    if sources is None:
        sources = token_sources(shard.split, device)
        own = shard.split.rank_of[::block].to(device) == shard.rank
        is_near = _reads_only(layout, own)
        if shard.exchange != "gather" and bool(is_near.any()):
            near = _part(layout, rows[is_near], own.nonzero().flatten())
            rows = rows[~is_near]

    named = named_blocks(of_rows(layout, rows))
    if shard.exchange == "gather":
        named = torch.ones_like(named)
    if named.shape[:2] == (1, 1) and sources.side_by_side:
        named = named[0]
    else:  # every sample and head fetches its own blocks
        named = _by_kv_head(named, heads)
        sources = sources.by_head(len(named))
    blocks = named.any(0).nonzero().flatten()
    keys = members(blocks, block, layout.num_keys)
    wanted = named[:, keys // block] & (sources.rank_of[:, keys] != NOWHERE)
    of_group, column = wanted.nonzero(as_tuple=True)
    exchange = plan_exchange(
        sources.rank_of[of_group, keys[column]],
        sources.row_of[of_group, keys[column]],
        of_group * len(keys) + column,
        len(named) * len(keys),
        shard,
    )
    far = _part(layout, rows, blocks) if len(rows) else None
    return KeyPlan(near, far, exchange, sources.side_by_side, len(keys))


def _reads_only(layout: BlockLayout, blocks: Tensor) -> Tensor:
    """Bool [NQ]: rows that, for every sample and head, read only key blocks where `blocks` [NKVB] is True."""
    table = layout.kv_indices
    inside = ((table < 0) | blocks[table.clamp(min=0).long()]).all(-1).all(0).all(0)
    inside[layout.dense_rows.long()] = bool(blocks.all())
    return inside


def _by_kv_head(named: Tensor, heads: Heads) -> Tensor:
    """[B|1, H|Hkv|1, NKVB] → [B · Hkv, NKVB]: what any query head of the group names."""
    if named.shape[1] == heads.q:
        named = named.unflatten(1, (heads.kv, -1)).any(2)
    return named.expand(heads.batch, heads.kv, -1).flatten(0, 1)


def _part(layout: BlockLayout, rows: Tensor, blocks: Tensor) -> Part:
    return Part(
        rows,
        members(rows, layout.q_block, layout.num_queries),
        of_keys(of_rows(layout, rows), blocks),
        members(blocks, layout.kv_block, layout.num_keys),
    )


def _compute(
    q: Tensor, k: Tensor, v: Tensor, part: Part, bias: Tensor | None, dropout: Dropout | None, with_lse: bool
) -> tuple[Tensor, ...]:
    if len(part.queries) < q.shape[2]:
        q = q[:, :, part.queries]
    if bias is not None:
        bias = bias[:, :, part.rows, : part.layout.kv_indices.shape[3]]
    if dropout is not None:
        dropout = replace(dropout, key_ids=part.key_ids)
    if with_lse:
        return block_sparse_attention_with_lse(q, k, v, part.layout, block_bias=bias, dropout=dropout)
    return (block_sparse_attention(q, k, v, part.layout, block_bias=bias, dropout=dropout),)


def _together(parts: list[tuple[Part, tuple[Tensor, ...]]]) -> tuple[Tensor, ...]:
    """Rows of all parts in the order of the queries."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([part.queries for part, _ in parts]).argsort()
    of_parts = zip(*(results for _, results in parts), strict=True)
    return tuple(torch.cat(rows, 2).index_select(2, order) for rows in of_parts)


def _nothing(q: Tensor, with_lse: bool) -> tuple[Tensor, ...]:
    """The result for no queries."""
    lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))  # as the kernels give it
    return (torch.zeros_like(q), lse)[: 1 + with_lse]


class _Tied(torch.autograd.Function):
    """The first argument; the second gets a gradient of zeros, so that its own backward runs."""

    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, torch.zeros_like(ctx.saved_tensors[0])
