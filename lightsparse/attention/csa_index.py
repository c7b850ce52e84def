"""Which entries a query reads: DeepSeek-V4's lightning indexer over compressed index keys, and the loss that trains it.

The score of query t for entry s is I = Σ_j w_j(x_t) · ReLU(⟨q_j(x_t), k_s⟩), few heads, one key (V4's eq. 13–17;
DeepSeek-V3.2, section 2.1). It chooses for all heads alike. The choice has no gradient: the indexer, its inputs
detached, learns from KL(p ‖ softmax I) over what is read, p being the attention weights of those entries, summed
over heads and normalised (V3.2, eq. 3–4; V4's published code has no training of the indexer).

Shapes: B batch, R queries, J index heads, F index width, S entries, K chosen entries of a query, H query heads, D head
dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import SequenceContext
from lightsparse.attention.csa_compress import Compressor, compressed, entry_positions
from lightsparse.attention.router import best, listed
from lightsparse.attention.top_blocks import _highest

_STD = 0.02
_AT_ONCE = 1 << 17  # numbers of a chunk of rows, or 64 per query where that is more


class Index(NamedTuple):
    """What scores are made of, at least fp32."""

    q: Tensor  # [B, R, J, F]
    weight: Tensor  # [B, R, J]
    keys: Tensor  # [B, S, F], of the whole sequence


class Visible(NamedTuple):
    """Which entries a query may choose from."""

    ended: Tensor  # int64 [R], ascending: entries that end at or before it
    q_doc: Tensor | None  # [B, R], and
    documents: Tensor | None  # [B, S]: those of its own document

    def mask(self, rows: slice, columns: Tensor) -> Tensor:
        """Bool [B|1, R, C]."""
        seen = (columns < self.ended[rows, None])[None]
        if self.q_doc is None or self.documents is None:
            return seen
        return seen & (self.q_doc[:, rows, None] == self.documents[:, None, columns])


class LightningIndexer(nn.Module):
    """Queries and weights from x, keys from a compressor of its own, in fp32 whatever autocast and parameters say."""

    def __init__(self, embed_dim: int, heads: int, width: int, stride: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(embed_dim, heads * width, bias=False)
        self.weight = nn.Linear(embed_dim, heads, bias=False)
        for linear in (self.query, self.weight):
            nn.init.normal_(linear.weight, std=_STD)
        self.compressor = Compressor(embed_dim, 1, width, stride, overlap=True)

    def forward(self, x: Tensor, ctx: SequenceContext, state: dict[str, Tensor]) -> Index:
        """x [B, R, E], detached here."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            q = F.linear(x, self.query.weight.to(x.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            keys = compressed(self.compressor, x, ctx, state, "index")
            if ctx.rotary is not None:
                q = ctx.rotary(q, ctx.positions)
                keys = ctx.rotary(keys, entry_positions(keys.shape[2], self.compressor.stride, ctx, keys.device))
            scale = (self.heads * q.shape[-1]) ** -0.5
            return Index(q.transpose(1, 2), F.linear(x, self.weight.weight.to(x.dtype)) * scale, keys[:, 0])


@torch.compiler.disable  # it goes by values
@torch.no_grad()
def choose(index: Index, top_k: int, visible: Visible) -> Tensor:
    """The best visible entries of each query, ascending, −1 padded, equal scores to the lower one: int32 [B, R, K]."""
    (batch, rows, heads, _), entries = index.q.shape, index.keys.shape[1]
    width, parts = min(top_k, entries), []
    with torch.autocast(index.q.device.type, enabled=False):
        for part in _chunks(rows, batch * heads * max(entries, 1)):
            columns = torch.arange(int(visible.ended[part.stop - 1]), device=index.keys.device)
            scores = _scores(index.q[:, part], index.weight[:, part], index.keys[:, : len(columns)])
            parts.append(_highest_of(scores, visible.mask(part, columns), min(width, len(columns)), width))
    return torch.cat(parts, 1)


def _scores(q: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """[B, R, S] for keys [B, S, F]; for keys of each query's own, [B, R, K, F], [B, R, K]."""
    products = torch.einsum("brjf,bsf->brjs" if keys.dim() == 3 else "brjf,brsf->brjs", q, keys)
    return torch.einsum("brjs,brj->brs", products.relu(), weight)


def _highest_of(scores: Tensor, among: Tensor, most: int, width: int) -> Tensor:
    if most == 0:
        return scores.new_full((*scores.shape[:2], width), -1, dtype=torch.int32)
    scores = scores.masked_fill(~among, -math.inf)
    ids = _highest(scores, most)
    if ids is None:  # equal scores at the border of the choice: the exact way
        ids = listed(best(scores, among.expand(scores.shape), most), most).long()
    behind = scores.shape[-1]
    ids = torch.where(ids < 0, behind, ids).sort(-1).values
    return F.pad(ids.masked_fill(ids == behind, -1), (0, width - most), value=-1).to(torch.int32)


class KL(NamedTuple):
    total: Tensor  # scalar: sum of the divergences, in nats
    rows: Tensor  # scalar: queries that chose something


@torch.compiler.disable
def divergence(index: Index, q: Tensor, keys: Tensor, lse: Tensor, over: Tensor | Visible) -> KL:
    """KL(p ‖ softmax I) over some entries of each query; its gradient goes into the index alone.

    q [B, H, R, D], keys [B, Hkv, S, D], lse [B, H, R] of the whole softmax
    over  a table of chosen entries, int32 [B, R, K], whose keys are gathered; or all that are visible
    """
    batch, heads, rows, _ = q.shape
    per_row = batch * keys.shape[2] * (index.q.shape[2] + heads)
    if isinstance(over, Tensor):
        per_row = batch * over.shape[2] * (keys.shape[1] * keys.shape[3] + index.keys.shape[2] + heads)
    q, keys, lse = q.detach(), keys.detach(), lse.detach()
    parts = []
    with torch.autocast(q.device.type, enabled=False):
        for part in _chunks(rows, per_row):
            columns, ids = slice(None), None
            if isinstance(over, Tensor):
                there, ids = over[:, part] >= 0, over[:, part].clamp(min=0).long()
            else:
                columns = slice(max(int(over.ended[part.stop - 1]), 1))
                there = over.mask(part, torch.arange(columns.stop, device=q.device)).expand(batch, -1, -1)
            given = (index.q[:, part], index.weight[:, part], index.keys[:, columns])
            rest = (q[:, :, part], keys[:, :, columns], lse[:, :, part], there)
            if torch.is_grad_enabled():
                parts.append(checkpoint(_divergence, *given, *rest, ids, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(_divergence(*given, *rest, ids))
    total, with_entries = zip(*parts, strict=True)
    return KL(torch.stack(total).sum(), torch.stack(with_entries).sum())


def _divergence(
    index_q: Tensor,
    weight: Tensor,
    index_keys: Tensor,
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    there: Tensor,
    ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Summed over rows, and how many rows have an entry. there: bool [B, R, K]; ids: which entries, or all."""
    logits = _scores(index_q, weight, index_keys if ids is None else _taken(index_keys, ids))
    target = _attention_share(q, keys, lse, there, ids)
    some = there.any(-1, keepdim=True)  # a row of nothing would be softmax(−inf) = NaN
    found = logits.masked_fill(~there & some, -math.inf).log_softmax(-1).masked_fill(~there, 0.0)
    return (torch.special.xlogy(target, target) - target * found).sum(), some.sum()


@torch.no_grad()
def _attention_share(q: Tensor, keys: Tensor, lse: Tensor, there: Tensor, ids: Tensor | None) -> Tensor:
    """p [B, R, K]: attention weights of these entries, summed over heads, normalised over them; 0 in rows of none."""
    grouped, keys = q.to(lse.dtype).unflatten(1, (keys.shape[1], -1)), keys.to(lse.dtype)
    if ids is None:
        logits = torch.einsum("bhgrd,bhkd->bhgrk", grouped, keys)
    else:
        logits = torch.einsum("bhgrd,brkhd->bhgrk", grouped, _taken(keys.transpose(1, 2), ids))
    logits = logits.flatten(1, 2) / math.sqrt(q.shape[-1])
    logits = (logits - lse[..., None]).masked_fill(~there[:, None], -math.inf)
    most = logits.amax((1, 3), keepdim=True)
    weights = (logits - most.masked_fill(most == -math.inf, 0.0)).exp().sum(1)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _taken(x: Tensor, ids: Tensor) -> Tensor:
    """Rows [B, S, …] at ids [B, R, K]: [B, R, K, …]."""
    first = torch.arange(len(x), device=x.device)[:, None, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + ids).flatten()).unflatten(0, ids.shape)


def _chunks(rows: int, per_row: int) -> Iterator[slice]:
    at_once = max(max(_AT_ONCE, 64 * rows) // max(per_row, 1), 1)
    for start in range(0, rows, at_once):
        yield slice(start, min(start + at_once, rows))
