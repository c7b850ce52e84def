"""DSA written out from its definition: every score of a sequence at once; autograd does the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from battery import Inputs, Shape, context
from torch import Tensor

from lightsparse.attention.core import AttentionResult, AttentionShape
from lightsparse.attention.dsa import DsaAttention, DsaConfig


def make(shape: Shape, top_k: int = 24, dtype: torch.dtype = torch.float32, **fields) -> DsaAttention:
    """Three index heads of width 8: about one score in eight is exactly zero."""
    torch.manual_seed(0)
    config = DsaConfig(**{"index_heads": 3, "index_dim": 8} | fields, top_k=top_k)
    of = AttentionShape(shape.heads, shape.kv_heads, shape.dim, shape.heads * shape.dim)
    core = DsaAttention(config, of).to(dtype)
    with torch.no_grad():
        for parameter in core.parameters():  # so that scores differ enough to be told apart
            parameter.add_(0.3 * torch.randn_like(parameter))
    return core


def run(core: DsaAttention, given: Inputs, documents: Tensor | None = None) -> AttentionResult:
    return core(*given.tensors()[:3], x=given.x, ctx=context(given.x.shape[1], documents))


@dataclass
class WrittenOut:
    out: Tensor
    chosen: Tensor  # bool [B, N, N]
    loss: Tensor  # mean over queries of KL(p ‖ softmax I) over what is chosen
    uniform: Tensor
    dense_loss: Tensor  # and over everything visible
    dense_uniform: Tensor


def written_out(core: DsaAttention, given: Inputs, top_k: int, documents: Tensor | None = None) -> WrittenOut:
    q, (k, v) = given.q, (t.repeat_interleave(given.q.shape[1] // t.shape[1], 1) for t in (given.k, given.v))
    n, ctx, part = q.shape[2], context(q.shape[2], documents), core.indexer
    x = given.x.detach()
    index_q = (x @ part.query.weight.T).unflatten(-1, (part.heads, -1)).transpose(1, 2)
    index_k = torch.nn.functional.layer_norm(
        x @ part.key.weight.T, (index_q.shape[-1],), part.key_norm.weight, part.key_norm.bias, 1e-6
    )
    index_q, index_k = ctx.rotary(index_q, ctx.positions), ctx.rotary(index_k[:, None], ctx.positions)
    weight = (x @ part.weight.weight.T) / (part.heads * index_q.shape[-1]) ** 0.5
    scores = torch.einsum("bjts,btj->bts", (index_q @ index_k.mT).relu(), weight)

    of_past = scores.detach()
    visible = torch.ones(n, n).tril().bool().expand(len(q), -1, -1)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None])
    chosen = torch.zeros_like(visible)
    for b in range(len(q)):
        for t in range(n):
            past = sorted(visible[b, t].nonzero().flatten().tolist(), key=lambda s: (-float(of_past[b, t, s]), s))
            chosen[b, t, past[:top_k]] = True

    logits = q @ k.mT / q.shape[-1] ** 0.5
    out = logits.masked_fill(~chosen[:, None], -torch.inf).softmax(-1) @ v

    def divergence(of: Tensor, among: Tensor) -> Tensor:
        p = logits.detach().masked_fill(~among[:, None], -torch.inf).softmax(-1).mean(1)
        found = of.masked_fill(~among, -torch.inf).log_softmax(-1)
        pairs = torch.where(among & (p > 0), p * (p.log() - found.masked_fill(~among, 0.0)), 0.0)
        return pairs.sum(-1).mean()

    flat = torch.zeros_like(scores)
    return WrittenOut(
        out,
        chosen,
        divergence(scores, chosen),
        divergence(flat, chosen),
        divergence(scores, visible),
        divergence(flat, visible),
    )
