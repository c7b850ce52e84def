"""Rows that stand for strides of tokens, where several ranks hold the sequence: all of them, or the one before each.

A stride is with its tokens: it divides the split's unit. Only complete strides have a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.context_parallel.exchange import Fetch, RowExchange, plan_exchange
from lightsparse.context_parallel.key_owners import as_table, from_table
from lightsparse.context_parallel.shard import ContextShard


@torch.compiler.disable
def gather_strides(x: Tensor, stride: int, shard: ContextShard | None) -> Tensor:
    """Rows [B, H, S, D] of all strides of the sequence, from those of each rank's own; differentiable."""
    if shard is None:
        return x
    count = shard.length // stride

    def planned() -> RowExchange:
        ids = torch.arange(count, device=x.device)
        return _plan(ids, ids, count, stride, shard)

    plan = shard.plans.get(shard, ("all strides", stride, x.device), planned)
    gathered = Fetch(plan, as_table(x, side_by_side=True), shard, "strides").result()
    return from_table(gathered, True, *x.shape[:2])


@torch.compiler.disable
def of_the_stride_before(x: Tensor, stride: int, shard: ContextShard | None) -> Tensor:
    """The row of the stride before each of this rank's, [B, S, D]; zeros before the first; differentiable."""
    if shard is None:
        return F.pad(x, (0, 0, 1, 0))[:, :-1]
    count = x.shape[1]

    def planned() -> RowExchange:
        ids = shard.tokens[: count * stride : stride].to(x.device) // stride
        at = torch.arange(count, device=x.device)
        return _plan(ids[ids > 0] - 1, at[ids > 0], count, stride, shard)

    plan = shard.plans.get(shard, ("stride before", stride, x.device), planned)
    fetched = Fetch(plan, as_table(x[:, None], side_by_side=True), shard, "strides").result()
    return from_table(fetched, True, len(x), 1)[:, 0]


def _plan(ids: Tensor, at: Tensor, size: int, stride: int, shard: ContextShard) -> RowExchange:
    """Strides `ids` of the sequence to places `at`."""
    rank_of, row_of = (of.to(ids.device)[ids * stride] for of in (shard.split.rank_of, shard.split.row_of))
    return plan_exchange(rank_of, row_of // stride, at, size, shard)
