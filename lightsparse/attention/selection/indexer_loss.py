"""The indexer's pass over all queries: what each chooses, and the loss that trains the indexer, some rows at a time.

The loss is KL(p ‖ softmax I) (DeepSeek-V3.2, section 2.1, eq. 3 and 4). p are the attention's weights, summed over the
heads and normalised, detached; both are over every visible key (dense warm-up) or over the chosen ones (sparse). Heads
count alike or, where their softmax has more in it than these keys (CSA's window), by the share of it on these keys. The
gradient in I is softmax I − p, so the gradients of the index are at hand as soon as the scores are: they are kept in
place of the scores, and nothing is computed again.

Where what is chosen is little beside all columns, its keys are gathered for each query; otherwise all columns are
multiplied and what is not chosen is masked. A row costs more or less by that; the numbers are the same. Masks are added
and multiplied, and nothing that underflows goes through exp: with scattered choices, masked_fill, where and such an exp
take twenty times as long on a CPU.

Keys are tokens or compressed entries, in the order in which they become visible.
Shapes: those of indexer.py, and H heads, g query heads of a key/value head, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightsparse.attention.selection.indexer import Index, Scores, chosen_columns, products
from lightsparse.attention.selection.row_parts import slices
from lightsparse.kernels import chunk_sizes
from lightsparse.patterns import ElementMask

_ROWS = 64  # a chunk's scores of all columns; on a CPU more rows are no faster
_WIDE_SCORES = 1 << 26  # of a chunk, where chunks are wide
_HIDDEN = -1e30  # added to a score; finite, so that a row of nothing but hidden ones stays free of NaN
_COPY, _LONE = 4, 2  # of a gathered key, and of one query against it; a product in a matrix product is 1 (routes.py)


class Keys(NamedTuple):
    """Of the attention, without gradient."""

    q: Tensor  # [B, H, R, D]
    k: Tensor  # [B, Hkv, C, D], of all columns
    rest: Tensor | None = None  # [B, H, R], log-sum-exp of what else each head's softmax holds; None = nothing

    def part(self, rows: slice, columns: int) -> Keys:
        """Of some rows, and the first columns."""
        rest = None if self.rest is None else self.rest[:, :, rows]
        return Keys(self.q[:, :, rows], self.k[:, :, :columns], rest)


class IndexerResult(NamedTuple):
    table: Tensor  # int32 [B, R, K]
    divergence: Tensor  # sum over rows of KL(p ‖ softmax I), in nats, differentiable in the index
    uniform: Tensor  # the same for equal weights in place of softmax I: the loss of an indexer that knows nothing
    rows: Tensor  # how many rows of all samples see any key; the others have no divergence


def choose(index: Index, mask: ElementMask, top_k: int) -> Tensor:
    """The top_k visible keys of each query by score: int32 [B, R, min(top_k, C)], ascending, −1 padded."""
    return _walk(index, mask, top_k, None, dense=False).table


def choose_and_learn(index: Index, mask: ElementMask, top_k: int, attention: Keys) -> IndexerResult:
    """The choice, and the loss over what is chosen."""
    return _learnt(index, _walk(index, mask, top_k, attention, dense=False))


def learn_from_dense(index: Index, mask: ElementMask, attention: Keys) -> IndexerResult:
    """The loss over everything visible; nothing is chosen, the table has no entries."""
    return _learnt(index, _walk(index, mask, 0, attention, dense=True))


class _Walked(NamedTuple):
    table: Tensor
    sums: Tensor  # [3]: of divergence, uniform and rows
    gradients: Index  # of the divergence


def _learnt(index: Index, walked: _Walked) -> IndexerResult:
    divergence, uniform, rows = walked.sums
    return IndexerResult(walked.table, _Known.apply(divergence, *index, *walked.gradients), uniform, rows)


@torch.compiler.disable  # depends on values
@torch.no_grad()
def _walk(index: Index, mask: ElementMask, top_k: int, attention: Keys | None, *, dense: bool) -> _Walked:
    """Rows in chunks; mask has the rows of the queries and all columns, and is causal."""
    (batch, rows), columns = index.q.shape[:2], index.keys.shape[1]
    width = min(top_k, columns)
    sums, tables = index.q.new_zeros(3), [index.q.new_empty(batch, 0, width, dtype=torch.int32)]
    gradients = Index(*(part if attention is None else torch.zeros_like(part) for part in index))
    with torch.autocast(index.q.device.type, enabled=False):
        if attention is not None:
            q, k, rest = attention
            attention = Keys(q.to(index.q), k.to(index.q), None if rest is None else rest.to(index.q))
        wide = chunk_sizes.is_wide(index.q.device)
        of_chunk = max(_WIDE_SCORES // max(columns, 1), 1) if wide else _ROWS
        for part in slices(rows, max(of_chunk // max(batch, 1), 1)):
            seen = columns
            if not wide:
                seen = max(int((mask.visible_from <= mask.q_pos[:, part].max()).sum()), 1)  # columns of the chunk
            now = Index(index.q[:, part], index.weight[:, part], index.keys[:, :seen])
            among = _visible(mask, part, seen)
            scores, chosen = Scores(now), among.expand(batch, -1, -1)
            if not dense:
                chosen, table = chosen_columns(scores.total, among, min(width, seen), width)
                tables.append(table)
            if attention is None:
                continue
            of = Index(gradients.q[:, part], gradients.weight[:, part], gradients.keys[:, :seen])
            to = attention.part(part, seen)
            if dense or not _is_gathered(width, seen, to):
                sums += _learn(now, scores, chosen, to, of, None)
                continue
            widest = max(index.keys.shape[2], to.k.shape[3])
            for few in slices(table.shape[1], max(of_chunk * columns // max(batch * width * widest, 1), 1)):
                ids = table[:, few].clamp(min=0).long()
                own = Index(now.q[:, few], now.weight[:, few], _taken(now.keys, ids))
                grads = Index(of.q[:, few], of.weight[:, few], of.keys)
                sums += _learn(own, Scores(own), table[:, few] >= 0, to.part(few, seen), grads, ids)
    return _Walked(torch.cat(tables, 1), sums, gradients)


def _learn(now: Index, scores: Scores, chosen: Tensor, attention: Keys, grads: Index, ids: Tensor | None) -> Tensor:
    """Divergence, its value for equal weights and 1, summed over rows: [3]; adds the index's gradients to `grads`.

    chosen  bool [B, R, C]: the set of each row; one without any counts for nothing
    ids     int64 [B, R, C]: which columns the keys in `now` are, where they are each row's own; grads.keys has all
    """
    kept = chosen.to(scores.total.dtype)
    hidden, count = (1 - kept).mul_(_HIDDEN), kept.sum(-1)
    p = _attention_share(attention, hidden, ids).mul_(kept)
    masked = scores.total.add(hidden)
    log_masked = masked.log_softmax(-1)
    negative_entropy = p.clamp(min=torch.finfo(p.dtype).tiny).log_().mul_(p).sum()
    divergence = negative_entropy - (p * log_masked).sum()
    uniform = negative_entropy + count.clamp(min=1).log().sum()

    d_scores = masked.softmax(-1).mul_(kept).sub_(p)
    for j, product in enumerate(scores.products):
        grads.weight[:, :, j] = (d_scores * product).sum(-1)
        d_product = (d_scores * now.weight[:, :, j, None]).mul_(product.sign_())  # 0 or 1
        q = now.q[:, :, j]
        if ids is None:
            grads.q[:, :, j] = torch.bmm(d_product, now.keys)
            grads.keys.baddbmm_(d_product.mT, q)
        else:
            grads.q[:, :, j] = torch.matmul(d_product[:, :, None], now.keys)[:, :, 0]
            for b, of_keys in enumerate(grads.keys):
                of_keys.index_add_(0, ids[b].flatten(), (d_product[b, ..., None] * q[b, :, None]).flatten(0, 1))
    return torch.stack([divergence, uniform, (count > 0).sum().to(p.dtype)])


def _attention_share(attention: Keys, hidden: Tensor, ids: Tensor | None) -> Tensor:
    """p [B, R, C]: the mean of the heads' softmax over what is not hidden, weighed by these columns' share of all."""
    q, k, rest = attention
    q = q * q.shape[-1] ** -0.5
    group, total = q.shape[1] // k.shape[1], torch.zeros_like(hidden)
    most = q.new_full((*hidden.shape[:2], 1), -torch.inf)  # the largest log of a head's weight so far
    for head in range(q.shape[1]):
        if head % group == 0:
            of_head = k[:, head // group] if ids is None else _taken(k[:, head // group], ids)
        logits = products(q[:, head], of_head).add_(hidden)
        shares = logits.softmax(-1)
        if rest is None:
            total += shares
            continue
        here = logits.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()  # their log-sum-exp
        log_weight = F.logsigmoid(here - rest[:, head, :, None])
        before, most = most, torch.maximum(most, log_weight)
        total.mul_((before - most).exp()).add_(shares.mul_((log_weight - most).exp()))
    return total.div_(total.sum(-1, keepdim=True))


def _visible(mask: ElementMask, rows: slice, columns: int) -> Tensor:
    """Bool [B|1, R, C]: what the rows may read of the first columns."""
    position = mask.q_pos[:, rows, None]
    seen = (mask.visible_from[:, None, :columns] <= position) & (position < mask.visible_until[:, None, :columns])
    if mask.q_doc is None or mask.kv_doc is None:
        return seen
    return seen & (mask.q_doc[:, rows, None] == mask.kv_doc[:, None, :columns])


def _is_gathered(width: int, columns: int, attention: Keys) -> bool:
    heads, kv_heads = attention.q.shape[1], attention.k.shape[1]
    return width * (kv_heads * _COPY + heads * _LONE) < columns * heads


def _taken(x: Tensor, ids: Tensor) -> Tensor:
    """Rows of x [B, C, W] at ids [B, R, K]: [B, R, K, W]."""
    first = torch.arange(len(x), device=x.device)[:, None, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + ids).flatten()).unflatten(0, ids.shape)


class _Known(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gradients = ctx.saved_tensors  # read once: under recomputation they can be unpacked only once
        return None, *(grad * of for of in gradients), *(None for _ in gradients)
