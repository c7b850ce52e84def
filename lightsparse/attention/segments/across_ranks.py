"""A rank's share of a gather of dilated segments (gather.py), where several ranks hold the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.attention.core import SequenceContext
from lightsparse.attention.segments.gather import Gather
from lightsparse.context_parallel.key_owners import NOWHERE, Sources
from lightsparse.context_parallel.shard import ContextShard
from lightsparse.patterns import BlockLayout
from lightsparse.patterns.parts import members, of_rows


def share(gather: Gather, k: Tensor, ctx: SequenceContext) -> tuple[BlockLayout, Tensor, Sources]:
    """This rank's share of a gather: blocks of slots that hold some of its tokens, which of its tokens stands in each
    slot (−1 = none of its own), and who has the keys. k [B, Hkv, n, D]."""
    shard, (batch, kv_heads) = ctx.shard, k.shape[:2]
    assert shard is not None
    return shard.plans.get(gather, (batch, kv_heads), lambda: _share_of(gather, batch, kv_heads, shard))


def _share_of(gather: Gather, batch: int, kv_heads: int, shard: ContextShard) -> tuple[BlockLayout, Tensor, Sources]:
    positions, layout = gather.positions, gather.layout
    assert positions is not None
    device, tokens = positions.device, positions.clamp(min=0)
    rank_of = torch.where(positions < 0, NOWHERE, shard.split.rank_of.to(device)[tokens])
    row_of = shard.split.row_of.to(device)[tokens]
    own = rank_of == shard.rank
    blocks = torch.nn.functional.pad(own.any(0).any(0), (0, -own.shape[2] % layout.q_block))
    rows = blocks.view(-1, layout.q_block).any(-1).nonzero().flatten()
    slots = members(rows, layout.q_block, layout.num_queries)
    of_queries = torch.where(own, row_of, -1)[:, :, slots].expand(batch, -1, -1)

    count = torch.tensor([*shard.split.counts, 0], device=device)[rank_of]  # tokens of the rank that has the key
    sample = torch.arange(batch, device=device)[:, None, None]
    table_rows = (sample * kv_heads + gather.kv_heads[None, :, None]) * count + row_of
    sources = Sources(
        rank_of.expand(batch, -1, -1).flatten(0, 1),
        table_rows.flatten(0, 1),
        shard.split.counts,
        side_by_side=False,
    )
    return of_rows(layout, rows), of_queries, sources
