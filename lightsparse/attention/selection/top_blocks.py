"""The k best key blocks of every query, by a score per block: a table with a row per query, equal scores to the lower
index.

Shapes: B batch, H query heads, R queries (rows), C key blocks (columns), D head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightsparse.attention.selection.router import best, listed
from lightsparse.attention.selection.row_parts import slices
from lightsparse.kernels import chunk_sizes

_SCORES, _WIDE_SCORES = 1 << 17, 1 << 28  # in memory at once; the second where chunks are wide (1 GiB in fp32)
_ONE_BY_ONE = 4  # up to so many maxima are faster one after the other than by topk (measured: 64 … 512 blocks)
_WIDE_ONE_BY_ONE = 16  # where chunks are wide; more are found by topk twice, as equal scores are never looked for


class Documents(NamedTuple):
    of_queries: Tensor  # [B, R]
    of_blocks: Tensor  # [B, C]: a block can be chosen by queries of this document


class Rule(NamedTuple):
    threshold: float = 0.0  # a block is read only with at least this share in the softmax over all that could be chosen
    first: bool = False  # the first block that could be chosen (the document's) is always read, and counted in top_k


PLAIN = Rule()


def top_blocks(
    q: Tensor,
    of_blocks: Tensor,
    own_R: Tensor,
    top_k: int,
    width: int,
    documents: Documents | None = None,
    rule: Rule = PLAIN,
) -> Tensor:
    """Own block and the top_k − 1 best before it, ascending, −1 padded: int32 [B, H, R, width].

    q          [B, H, R, D]; of_blocks [B, Hkv, C, D]: the score of a pair is their product
    own_R      int64 [R]: the block that a query stands in, ascending; always read, and counted in top_k
    width      entries of a row: at least min(top_k, C)
    """
    batch, heads, rows, _ = q.shape
    scores = chunk_sizes.at_once(q.device, _SCORES, _WIDE_SCORES)
    at_once = max(scores // max(batch * heads * of_blocks.shape[2], 1), 1)
    parts = [_chosen(q, of_blocks, own_R, top_k, width, documents, rule, part) for part in slices(rows, at_once)]
    return torch.cat(parts, 2) if parts else own_R.new_empty(batch, heads, 0, width, dtype=torch.int32)


def _chosen(
    q: Tensor,
    of_blocks: Tensor,
    own_R: Tensor,
    top_k: int,
    width: int,
    documents: Documents | None,
    rule: Rule,
    part: slice,
) -> Tensor:
    own = own_R[part]
    columns = of_blocks.shape[2]
    if not chunk_sizes.is_wide(q.device):
        columns = int(own[-1]) if len(own) else 0  # blocks before the last row's own one
    most = min(top_k - 1, columns, width - 1)
    if most == 0:
        table = own.to(torch.int32).expand(*q.shape[:2], -1)[..., None]
        return torch.nn.functional.pad(table, (0, width - 1), value=-1)
    q = q[:, :, part].to(of_blocks.dtype)
    scores = torch.einsum("bhgrd,bhcd->bhgrc", q.unflatten(1, (of_blocks.shape[1], -1)), of_blocks[:, :, :columns])
    scores = scores.flatten(1, 2)
    before = (torch.arange(columns, device=q.device) < own[:, None])[None, None]
    if documents is not None:
        same = documents.of_blocks[:, None, :columns] == documents.of_queries[:, part, None]
        before = before & same[:, None]
    scores.masked_fill_(~before, -math.inf)
    scores, before = _by_rule(scores, before, rule)
    ids = _highest(scores, most)
    if ids is None:  # exact for equal scores at the border of the choice
        ids = listed(best(scores, before.expand(scores.shape), most), most).long()
    ids = torch.where(ids < 0, own[:, None] + 1, ids)  # of a row with fewer candidates; behind the own block
    ids = torch.cat([ids, own[:, None].expand(*ids.shape[:3], 1)], -1).sort(-1).values
    ids = ids.masked_fill_(ids > own[:, None], -1).to(torch.int32)
    return torch.nn.functional.pad(ids, (0, width - ids.shape[-1]), value=-1)


def _by_rule(scores: Tensor, before: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Scores and candidates, −inf and False for what the rule leaves out, +inf for what it forces."""
    chosen = before
    if rule.threshold:
        open_ = scores.softmax(-1) >= rule.threshold  # NaN, of a row without a candidate, is not
        scores, chosen = scores.masked_fill(~open_, -math.inf), before & open_
    if rule.first:
        first = before & (before.cumsum(-1) == 1)
        scores, chosen = scores.masked_fill(first, math.inf), chosen | first
    return scores, chosen


def _highest(scores: Tensor, most: int) -> Tensor | None:
    """Indices of the `most` highest, −1 for scores of −inf: [.., most]; None where that would take a look at
    whether equal ones make it ambiguous, or they do.
    """
    wide = chunk_sizes.is_wide(scores.device)
    if most <= (_WIDE_ONE_BY_ONE if wide else _ONE_BY_ONE):
        scores, ids = scores.clone(), []
        for _ in range(most):
            value, index = scores.max(-1, keepdim=True)  # the first of equal ones
            ids.append(torch.where(value == -math.inf, -1, index))
            scores.scatter_(-1, index, -math.inf)
        return torch.cat(ids, -1)
    if wide:
        return None
    value, index = scores.topk(most, -1)
    lowest = value[..., -1:]
    if bool(((scores >= lowest).sum(-1, keepdim=True) > most).logical_and(lowest > -math.inf).any()):
        return None
    return torch.where(value == -math.inf, -1, index)
