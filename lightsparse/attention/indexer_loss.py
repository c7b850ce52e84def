"""The indexer's pass over all queries: what each chooses, and the loss that trains the indexer, some rows at a time.

The loss is KL(p ‖ softmax I) (DeepSeek-V3.2, section 2.1, eq. 3 and 4). p are the attention's weights, summed over the
heads and normalised, detached; both are over every visible token (dense warm-up) or over the chosen ones (sparse). Its
gradient in I is softmax I − p, so the gradients of the index are at hand as soon as the scores are: they are kept in
place of the scores, and nothing is computed again.

Where what is chosen is little beside all columns, its keys are gathered for each query; otherwise all columns are
multiplied and what is not chosen is masked. A row costs more or less by that; the numbers are the same.

Shapes: those of indexer.py, and H heads, g query heads of a key/value head, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightsparse.attention.indexer import Index, Scores, chosen_columns, products
from lightsparse.patterns import ElementMask

_ROWS = 64  # a chunk's scores of all columns; more rows are no faster
_COPY, _LONE = 4, 2  # of a gathered key, and of one query against it; a product in a matrix product is 1 (routes.py)


class Keys(NamedTuple):
    """Of the attention, without gradient."""

    q: Tensor  # [B, H, R, D]
    k: Tensor  # [B, Hkv, C, D], of all columns


class Found(NamedTuple):
    table: Tensor  # int32 [B, R, K]
    divergence: Tensor  # sum over rows of KL(p ‖ softmax I), in nats, differentiable in the index
    uniform: Tensor  # the same for equal weights in place of softmax I: what knowing nothing costs


def choose(index: Index, mask: ElementMask, top_k: int) -> Tensor:
    """The top_k visible tokens of each query by score: int32 [B, R, min(top_k, C)], ascending, −1 padded."""
    return _walk(index, mask, top_k, None, dense=False).table


def choose_and_learn(index: Index, mask: ElementMask, top_k: int, attention: Keys) -> Found:
    """The choice, and the loss over what is chosen."""
    return _learnt(index, _walk(index, mask, top_k, attention, dense=False))


def learn_from_dense(index: Index, mask: ElementMask, attention: Keys) -> Found:
    """The loss over everything visible; nothing is chosen, the table has no entries."""
    return _learnt(index, _walk(index, mask, 0, attention, dense=True))


class _Walked(NamedTuple):
    table: Tensor
    divergence: Tensor
    uniform: Tensor
    gradients: Index  # of the divergence


def _learnt(index: Index, found: _Walked) -> Found:
    return Found(found.table, _Known.apply(found.divergence, *index, *found.gradients), found.uniform)


@torch.compiler.disable  # it goes by values
@torch.no_grad()
def _walk(index: Index, mask: ElementMask, top_k: int, attention: Keys | None, *, dense: bool) -> _Walked:
    """Rows in chunks; mask has the rows of the queries and all columns, and is causal."""
    (batch, rows), columns = index.q.shape[:2], index.keys.shape[1]
    width = min(top_k, columns)
    sums, tables = index.q.new_zeros(2), [index.q.new_empty(batch, 0, width, dtype=torch.int32)]
    gradients = Index(*(part if attention is None else torch.zeros_like(part) for part in index))
    with torch.autocast(index.q.device.type, enabled=False):
        if attention is not None:
            attention = Keys(*(part.to(index.q.dtype) for part in attention))
        for part in _chunks(rows, max(_ROWS // batch, 1)):
            seen = int(mask.q_pos[:, part].max()) + 1  # columns that some row of the chunk may read
            now = Index(index.q[:, part], index.weight[:, part], index.keys[:, :seen])
            among = _visible(mask, part, seen)
            scores, chosen = Scores(now), among.expand(batch, -1, -1)
            if not dense:
                chosen, table = chosen_columns(scores.total, among, min(width, seen), width)
                tables.append(table)
            if attention is None:
                continue
            of = Index(gradients.q[:, part], gradients.weight[:, part], gradients.keys[:, :seen])
            to = Keys(attention.q[:, :, part], attention.k[:, :, :seen])
            if dense or not _is_gathered(width, seen, to):
                sums += _learn(now, scores, chosen, to, of, None)
                continue
            widest = max(index.keys.shape[2], to.k.shape[3])
            for few in _chunks(table.shape[1], max(_ROWS * columns // (batch * width * widest), 1)):
                ids = table[:, few].clamp(min=0).long()
                own = Index(now.q[:, few], now.weight[:, few], _taken(now.keys, ids))
                grads = Index(of.q[:, few], of.weight[:, few], of.keys)
                sums += _learn(own, Scores(own), table[:, few] >= 0, Keys(to.q[:, :, few], to.k), grads, ids)
    return _Walked(torch.cat(tables, 1), sums[0], sums[1], gradients)


def _learn(now: Index, scores: Scores, chosen: Tensor, attention: Keys, grads: Index, ids: Tensor | None) -> Tensor:
    """Divergence and its value for equal weights, summed over rows: [2]; adds the gradients of the index to `grads`.

    chosen  bool [B, R, C]: the set of each row, never empty
    ids     int64 [B, R, C]: which columns the keys in `now` are, where they are each row's own; grads.keys has all
    """
    p = _attention_share(attention, chosen, ids)
    log_found = scores.total.masked_fill(~chosen, -torch.inf).log_softmax(-1).masked_fill_(~chosen, 0.0)
    negative_entropy = torch.special.xlogy(p, p).sum()
    divergence = negative_entropy - (p * log_found).sum()
    uniform = negative_entropy + chosen.sum(-1).to(p.dtype).log().sum()

    d_scores = log_found.exp_().masked_fill_(~chosen, 0.0).sub_(p)
    for j, product in enumerate(scores.products):
        grads.weight[:, :, j] = (d_scores * product).sum(-1)
        d_product = (d_scores * now.weight[:, :, j, None]).masked_fill_(product <= 0, 0.0)
        q = now.q[:, :, j]
        if ids is None:
            grads.q[:, :, j] = torch.bmm(d_product, now.keys)
            grads.keys.baddbmm_(d_product.mT, q)
        else:
            grads.q[:, :, j] = torch.matmul(d_product[:, :, None], now.keys)[:, :, 0]
            for b, of_keys in enumerate(grads.keys):
                of_keys.index_add_(0, ids[b].flatten(), (d_product[b, ..., None] * q[b, :, None]).flatten(0, 1))
    return torch.stack([divergence, uniform])


def _attention_share(attention: Keys, chosen: Tensor, ids: Tensor | None) -> Tensor:
    """p [B, R, C]: the mean over heads of their softmax over the chosen columns, 0 for the others."""
    q, k = attention
    q = q * q.shape[-1] ** -0.5
    group, total = q.shape[1] // k.shape[1], torch.zeros((), device=q.device, dtype=q.dtype)
    for h in range(k.shape[1]):
        of_head = k[:, h] if ids is None else _taken(k[:, h], ids)
        for head in range(h * group, (h + 1) * group):
            logits = products(q[:, head], of_head).masked_fill_(~chosen, -torch.inf)
            total = total + logits.softmax(-1)
    return total / q.shape[1]


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


def _chunks(rows: int, at_once: int) -> Iterator[slice]:
    for start in range(0, rows, at_once):
        yield slice(start, min(start + at_once, rows))


class _Known(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gradients = ctx.saved_tensors  # only once: recomputation hands them out once
        return None, *(grad * of for of in gradients), *(None for _ in gradients)
