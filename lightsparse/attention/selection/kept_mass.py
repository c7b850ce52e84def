"""How much of dense attention's weight a selection keeps, on a few sampled queries: cheap enough for every step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.attention.core import SequenceContext
from lightsparse.context_parallel.shard import ContextShard, sum_over
from lightsparse.patterns import interval_mask

_SAMPLED = 8  # queries of each sample and head, at equal distances; the last one stands at the sequence's end


def sampled_queries(length: int, device: torch.device) -> Tensor:
    """Their places in a sequence: int64 [min(8, length)]."""
    count = min(_SAMPLED, length)
    return (torch.arange(count, device=device) + 1) * length // max(count, 1) - 1


@torch.compiler.disable
@torch.no_grad()
def queries_at(q: Tensor, at: Tensor, ctx: SequenceContext) -> Tensor:
    """Queries [B, H, m, D] at some places of the sequence, on every rank that shares it; q [B, H, n, D]: its own."""
    if ctx.shard is None:
        return q[:, :, at]
    tokens = ctx.shard.tokens.to(q.device)
    row = torch.searchsorted(tokens, at).clamp(max=len(tokens) - 1)
    return sum_over(q[:, :, row] * (tokens[row] == at)[:, None], ctx.shard)


@torch.compiler.disable
@torch.no_grad()
def kept_mass(q_at: Tensor, k: Tensor, table: Tensor, at: Tensor, block: int, ctx: SequenceContext) -> Tensor:
    """Share of the softmax weight over all visible keys that falls on chosen blocks, mean over the sampled: scalar.

    q_at   [B, H, m, D]: the queries at places `at` of a causal sequence (`queries_at`)
    k      [B, Hkv, n, D]: its keys, or with ctx.shard this rank's
    table  int32 [B, H, m, K]: the blocks of `block` keys that those queries read, −1 padded
    """
    shard, device = ctx.shard, k.device
    length = k.shape[2] if shard is None else shard.length
    tokens = torch.arange(length, device=device) if shard is None else shard.tokens.to(device)
    blocks = -(-length // block)
    chosen = torch.zeros(*table.shape[:3], blocks + 1, dtype=torch.bool, device=device)
    chosen.scatter_(3, torch.where(table < 0, blocks, table).long(), True)

    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(device.type, enabled=False):
        scores = torch.einsum("bhgmd,bhnd->bhgmn", q_at.to(dtype).unflatten(1, (k.shape[1], -1)), k.to(dtype))
    scores = scores.flatten(1, 2)
    mask = interval_mask(length, documents=ctx.documents, device=device).of_queries(at).to_dense()[..., tokens]
    scores = (scores / k.shape[-1] ** 0.5).masked_fill(~mask, torch.finfo(dtype).min)
    most = scores.amax(-1, keepdim=True)
    if shard is not None:
        most = _most_of_ranks(most, shard)
    weights = (scores - most).exp() * mask
    sums = torch.stack([weights.sum(-1), (weights * chosen[..., tokens // block]).sum(-1)])
    if shard is not None:
        sums = sum_over(sums, shard)
    return (sums[1] / sums[0]).mean().float()


def _most_of_ranks(x: Tensor, shard: ContextShard) -> Tensor:
    """The largest x of all ranks."""
    of_ranks = x.new_zeros(shard.world, *x.shape)
    of_ranks[shard.rank] = x
    return sum_over(of_ranks, shard).amax(0)
