"""A core's attention over a sequence that ranks share, to be compared with the whole on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from battery import ROTARY, Inputs, Shape, Variant, context, documents_at
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import AttentionCore, AttentionResult, SequenceContext
from lightsparse.context_parallel import attend
from lightsparse.context_parallel.shard import ContextShard, Exchange
from lightsparse.context_parallel.split import SplitKind, split
from lightsparse.patterns.mask import document_starts

SHAPE = Shape(333, 2, 4, 2, 16)


@dataclass(frozen=True)
class Case:
    shape: Shape = SHAPE
    causal: bool = True
    borders: tuple[int, ...] = ()  # document borders; the second sample has only the first of them
    kind: SplitKind = "contiguous"
    exchange: Exchange = "sparse"
    dropout: float = 0.0
    training: bool = False
    precision: str = "float64"
    fields: tuple[tuple[str, Any], ...] = ()  # of the config, beside those of `small()`
    checkpoint: bool = False  # recompute the attention in the backward
    evaluated: bool = False  # the same shard has first served an evaluation
    most_shares: float | None = None  # what auto fetches before it takes the ring

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    def documents(self) -> Tensor | None:
        if not self.borders:
            return None
        rows = [documents_at(self.shape.n, *self.borders[: None if b == 0 else 1]) for b in range(self.shape.batch)]
        return torch.cat(rows)

    def core(self, variant: Variant) -> AttentionCore:
        fields = {"dropout": self.dropout, **dict(self.fields)}
        core = variant.core(self.shape, causal=self.causal, dtype=self.dtype, **fields)
        return core.train(self.training)

    def weights(self) -> Tensor:
        """Of the output in the loss: [B, H, N, D]."""
        b, n, h, d = self.shape.batch, self.shape.n, self.shape.heads, self.shape.dim
        g = torch.Generator().manual_seed(9)
        return torch.randn(b, h, n, d, generator=g, dtype=torch.float64).to(self.dtype)


def whole(variant: Variant, case: Case) -> dict[str, Any]:
    """What one rank finds."""
    core, given = case.core(variant), Inputs.random(case.shape, dtype=case.dtype).leaves()
    ctx = context(case.shape.n, case.documents())
    return _found(core, core(*given.tensors()[:3], x=given.x, ctx=ctx), given, case.weights(), 1.0)


def share(rank: int, world: int, variant: Variant, case: Case, groups: int = 1) -> dict[str, Any]:
    """What each of the ranks finds for its tokens; `groups` sequences at once, each over world / groups ranks."""
    context_ranks = world // groups
    group = _group(rank, world, context_ranks)
    core = case.core(variant)
    unit = core.split_granularity()
    loads = core.row_costs(case.shape.n, unit)
    shard = ContextShard(split(case.kind, case.shape.n, unit, context_ranks, loads), group, case.exchange)
    everything, tokens = Inputs.random(case.shape, dtype=case.dtype), shard.tokens
    given = Inputs(*(t[:, :, tokens] for t in everything.tensors()[:3]), everything.x[:, tokens]).leaves()
    documents = case.documents()
    positions = torch.arange(case.shape.n)[None] - (0 if documents is None else document_starts(documents))

    def attended() -> AttentionResult:
        ctx = SequenceContext(positions[:, tokens], documents, seed=5, shard=shard, rotary=ROTARY.rotated)
        return core(*given.tensors()[:3], x=given.x, ctx=ctx)

    if case.most_shares is not None:
        attend._MOST_SHARES = case.most_shares
    if case.evaluated:
        with torch.inference_mode():
            attended()
    result = checkpoint(attended, use_reentrant=False) if case.checkpoint else attended()
    attend._MOST_SHARES = 4
    found = _found(core, result, given, case.weights()[:, :, tokens], len(tokens) / case.shape.n)
    return {**found, "tokens": tokens, "sent": dict(shard.traffic.sent), "plans": len(shard.plans)}


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def _group(rank: int, world: int, size: int) -> dist.ProcessGroup:
    if size == world:
        return dist.group.WORLD
    for first in range(0, world, size):
        ranks = tuple(range(first, first + size))
        if ranks not in _groups:
            _groups[ranks] = dist.new_group(list(ranks))
    first = rank - rank % size
    return _groups[tuple(range(first, first + size))]


def _found(
    core: AttentionCore, result: AttentionResult, given: Inputs, weights: Tensor, share_of_aux: float
) -> dict[str, Any]:
    loss = (result.out * weights).sum()
    if result.aux_loss is not None:
        loss = loss + result.aux_loss * share_of_aux
    inputs, parameters = list(given.tensors()[:3]), list(core.parameters())
    grads = torch.autograd.grad(loss, [*inputs, *parameters])
    return {
        "out": result.out.detach(),
        "grads": list(grads[:3]),
        "parameters": list(grads[3:]),
        "choice": result.choice,
        "stats": {name: value.detach() for name, value in result.stats.items()},
        "aux_loss": None if result.aux_loss is None else result.aux_loss.detach(),
    }
