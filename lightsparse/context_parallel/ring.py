"""Ring attention: keys travel from rank to rank, one rank's share at a time, and partial rows merge by log-sum-exp.

Liu et al. 2023, arXiv 2310.01889, section 3. Memory is that of two shares whatever the pattern reads. Shares that a
rank's rows do not read cost it no computation; the ring stops when no rank has anything left to read.

With out_c and lse_c the attention over share c alone, w_c = exp(lse_c − lse) and out = Σ w_c · out_c. Hence
d out_c = w_c · d out and d lse_c = w_c · (⟨d out, out_c − out⟩ + d lse): the gradient of the whole from those of parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightsparse.context_parallel.shard import ContextShard, most_over
from lightsparse.kernels import Dropout, block_sparse_attention_with_lse
from lightsparse.patterns import BlockLayout
from lightsparse.patterns.parts import members, of_keys
from lightsparse.utils.rank_errors import ranks_named


@dataclass(frozen=True, eq=False)
class RingPlan:
    """What one rank computes at each hop.

    layouts  per hop s, this rank's rows against the keys of rank − s; None where they read none of them
    key_ids  per hop, the numbers of those keys in the sequence
    hops     hops after which no rank reads anything more, the first, its own keys, included
    """

    layouts: list[BlockLayout | None]
    key_ids: list[Tensor]
    hops: int


def plan_ring(layout: BlockLayout, shard: ContextShard) -> RingPlan:
    """Together with all ranks of the group."""
    device, me = layout.kv_indices.device, shard.rank
    layouts: list[BlockLayout | None] = []
    key_ids: list[Tensor] = []
    for hop in range(shard.world):
        blocks = shard.split.blocks((me - hop) % shard.world, layout.kv_block).to(device)
        of_share = of_keys(layout, blocks)
        reads = of_share.kv_indices.shape[3] > 0 or len(of_share.dense_rows) > 0
        layouts.append(of_share if reads else None)
        key_ids.append(members(blocks, layout.kv_block, layout.num_keys))
    last = max((hop for hop, of_share in enumerate(layouts) if of_share is not None), default=0)
    return RingPlan(layouts, key_ids, hops=int(most_over(last + 1, shard, device)))


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, shard: ContextShard, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, H, n, D] of this rank's queries, and the lse [B, H, n]."""
    return _Ring.apply(q, k, v, plan, shard, dropout)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, shard: ContextShard, dropout: Dropout | None):
        total = torch.zeros(q.shape, dtype=_precise(q), device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float64, device=q.device)  # as in kernels/operator.py
        for hop, share in _passing(torch.cat([k, v], -1), plan, shard):
            if plan.layouts[hop] is None:
                continue
            out_c, lse_c = _partial(q, share, plan, hop, dropout)
            both = torch.logaddexp(lse, lse_c)
            total.mul_(_weight(lse, both)).add_(out_c * _weight(lse_c, both))
            lse = both
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.shard, ctx.dropout = plan, shard, dropout
        return out, lse.to(_precise(q))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor, grad_lse: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        plan, shard = ctx.plan, ctx.shard
        grad_q = torch.zeros(q.shape, dtype=_precise(q), device=q.device)
        # The gradient of a share travels with it, one hop behind, and at last goes home.
        grad_share = torch.zeros(*k.shape[:3], 2 * k.shape[3], dtype=_precise(k), device=k.device)
        for hop, share in _passing(torch.cat([k, v], -1), plan, shard):
            if hop:
                grad_share = _sent(grad_share, shard, 1, share.shape, "key gradients")
            if plan.layouts[hop] is None:
                continue
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q, share)]
                out_c, lse_c = _partial(inputs[0], inputs[1], plan, hop, ctx.dropout)
            weight = _weight(lse_c.detach(), lse).to(grad_q.dtype)
            along = (grad_out * (out_c.detach() - out)).sum(-1) + grad_lse
            found = torch.autograd.grad(
                (out_c, lse_c), inputs, ((weight * grad_out).to(q.dtype), weight[..., 0] * along)
            )
            grad_q += found[0]
            grad_share += found[1]
        if plan.hops > 1:
            home = (*k.shape[:3], 2 * k.shape[3])
            grad_share = _sent(grad_share, shard, 1 - plan.hops, home, "key gradients")
        grad_k, grad_v = grad_share.chunk(2, -1)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _passing(own: Tensor, plan: RingPlan, shard: ContextShard):
    """(hop, the share that is here now), the next one on its way while the caller computes on this one."""
    share = own
    for hop in range(plan.hops):
        coming = None
        if hop + 1 < plan.hops:
            tokens = shard.split.counts[(shard.rank - hop - 1) % shard.world]
            coming = _send(share, shard, 1, (*own.shape[:2], tokens, own.shape[3]), "keys")
        yield hop, share
        if coming is not None:
            share = _arrived(coming, shard)


def _sent(x: Tensor, shard: ContextShard, by: int, shape: tuple[int, ...], what: str) -> Tensor:
    """x from the rank `by` places back, while this rank's goes as far on."""
    return _arrived(_send(x, shard, by, shape, what), shard)


def _arrived(coming: tuple[Tensor, list[dist.Work]], shard: ContextShard) -> Tensor:
    received, works = coming
    with ranks_named(shard.timeout):
        for work in works:
            work.wait()
    return received


def _send(x: Tensor, shard: ContextShard, by: int, shape: tuple[int, ...], what: str) -> tuple[Tensor, list[dist.Work]]:
    """Start to send x to the rank `by` places on, and to receive a tensor of that shape from as far back."""
    received = torch.empty(shape, dtype=x.dtype, device=x.device)
    to, source = ((shard.rank + step) % shard.world for step in (by, -by))
    shard.traffic.add(what, x.numel() * x.element_size())
    peers = [dist.get_global_rank(shard.group, rank) for rank in (to, source)]
    both = [
        dist.P2POp(dist.isend, x.contiguous(), peers[0], shard.group),
        dist.P2POp(dist.irecv, received, peers[1], shard.group),
    ]
    with ranks_named(shard.timeout):
        return received, dist.batch_isend_irecv(both)


def _partial(q: Tensor, share: Tensor, plan: RingPlan, hop: int, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    layout = plan.layouts[hop]
    assert layout is not None
    if dropout is not None:
        dropout = replace(dropout, key_ids=plan.key_ids[hop])
    k, v = share.chunk(2, -1)
    return block_sparse_attention_with_lse(q, k, v, layout, dropout=dropout)


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part − whole) [B, H, n, 1]; 0 where the part reads nothing."""
    return torch.where(part == float("-inf"), 0.0, (part - whole).exp())[..., None]


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
