"""DeepSeek-V3.2's lightning indexer: few small heads that score every past key for every query (section 2.1, eq. 1).

    I[t, s] = Σ_j w[t, j] · ReLU(⟨q[t, j], k[s]⟩)

One index key is shared by all index heads, and the choice by all heads of the attention. DSA's keys are those of tokens
(LayerNorm, then rotated: `Indexer`), CSA's those of compressed entries (csa.py). Everything is computed in fp32
at least, whatever autocast and parameters say, from x detached: what the indexer learns changes nothing before it.

Shapes: B batch, R queries (rows), J index heads, F index width, C keys (columns), K entries of a row's table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightsparse.attention.core import SequenceContext
from lightsparse.attention.selection.router import best
from lightsparse.kernels import chunk_sizes

STD = 0.02  # of new projections, as in the model's layers
_EPS = 1e-6  # of the LayerNorm, as published


class Index(NamedTuple):
    """What the scores of some tokens are made of."""

    q: Tensor  # [B, R, J, F]
    weight: Tensor  # [B, R, J]
    keys: Tensor  # [B, C, F]


class IndexQueries(nn.Module):
    """x → index queries and weights, 1 / √(J · F) in the weights; subclasses make the projections and add the keys."""

    heads: int
    query: nn.Linear  # E → J · F
    weight: nn.Linear  # E → J

    def of_queries(self, x: Tensor, ctx: SequenceContext) -> tuple[Tensor, Tensor]:
        """[B, n, J, F] and [B, n, J] in the dtype of x [B, n, E], which is at ctx.positions."""
        q = F.linear(x, self.query.weight.to(x.dtype)).unflatten(-1, (self.heads, -1))
        if ctx.rotary is not None:
            q = ctx.rotary(q.transpose(1, 2), ctx.positions).transpose(1, 2)
        return q, F.linear(x, self.weight.weight.to(x.dtype)) * (self.heads * q.shape[-1]) ** -0.5


class Indexer(IndexQueries):
    """x → index queries, weights and keys of its tokens."""

    def __init__(self, embed_dim: int, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(embed_dim, heads * width, bias=False)
        self.key = nn.Linear(embed_dim, width, bias=False)
        self.weight = nn.Linear(embed_dim, heads, bias=False)
        self.key_norm = nn.LayerNorm(width, eps=_EPS)
        for linear in (self.query, self.key, self.weight):
            nn.init.normal_(linear.weight, std=STD)

    def forward(self, x: Tensor, ctx: SequenceContext) -> Index:
        """x [B, n, E] at ctx.positions → Index with R = C = n, differentiable in the parameters alone."""
        with torch.autocast(x.device.type, enabled=False):
            x = as_read(x)
            key, scale, offset = (of.to(x.dtype) for of in (self.key.weight, *self.key_norm.parameters()))
            keys = F.layer_norm(F.linear(x, key), scale.shape, scale, offset, _EPS)
            if ctx.rotary is not None:
                keys = ctx.rotary(keys[:, None], ctx.positions)[:, 0]
            return Index(*self.of_queries(x, ctx), keys)


def as_read(x: Tensor) -> Tensor:
    """The layer's input as an indexer reads it: detached, at least fp32."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def products(q: Tensor, keys: Tensor) -> Tensor:
    """Queries [B, R, W] times keys, all rows' [B, C, W] or each row's own [B, R, C, W]: [B, R, C]."""
    if keys.dim() == 3:
        return torch.bmm(q, keys.mT)
    return torch.matmul(q[:, :, None], keys.mT)[:, :, 0]


class Scores:
    """I [B, R, C] of queries for keys as in `products`, and what its gradient needs: those of each index head."""

    def __init__(self, of: Index):
        self.products = [products(of.q[:, :, j], of.keys).relu_() for j in range(of.q.shape[2])]
        self.total = self.products[0] * of.weight[:, :, 0, None]
        for j, product in enumerate(self.products[1:], start=1):
            self.total.addcmul_(product, of.weight[:, :, j, None])


def chosen_columns(scores: Tensor, among: Tensor, most: int, width: int) -> tuple[Tensor, Tensor]:
    """The `most` highest of the scores [B, R, C] `among` which a row may choose, equal ones to the lower column.

    Returns bool [B, R, C], and the same as a table int32 [B, R, width], ascending, −1 padded.
    """
    chosen = best(scores, among, most)
    if chunk_sizes.is_wide(scores.device):  # no look at how many there are: those that are not go to one entry more
        place = torch.where(chosen, chosen.cumsum(-1) - 1, width)
        column_BRC = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device).expand(place.shape)
        table = torch.full((*place.shape[:-1], width + 1), -1, dtype=torch.int32, device=scores.device)
        return chosen, table.scatter_(-1, place, column_BRC)[..., :width].contiguous()
    counts = chosen.sum(-1).flatten()
    row, column = chosen.flatten(0, 1).nonzero(as_tuple=True)
    first = counts.cumsum(0) - counts
    table = torch.full((len(counts), width), -1, dtype=torch.int32, device=scores.device)
    table[row, torch.arange(len(row), device=row.device) - first[row]] = column.to(torch.int32)
    return chosen, table.unflatten(0, chosen.shape[:2])
