"""Rows of a layout as plain booleans, for a few queries at a time: what the analyses of this folder are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightsparse.patterns import BlockLayout
from lightsparse.patterns.mask import ALWAYS


def evenly(layout: BlockLayout, count: int) -> Tensor:
    """Up to `count` query indices spread evenly over the layout's queries, the last one included: int64 [R]."""
    if count < 1:
        raise ValueError(f"count is {count}; it counts sampled queries and must be at least 1")
    last, count = layout.num_queries - 1, min(count, layout.num_queries)
    return torch.linspace(last, 0, count, dtype=torch.float64).round().long().flip(0).to(layout.mask.device)


def chunks(queries: Tensor, elements_per_query: int, budget: int = 1 << 24) -> Iterator[Tensor]:
    """The queries in runs whose rows together hold at most `budget` elements, one query at least."""
    yield from queries.split(max(budget // elements_per_query, 1))


def read_by(layout: BlockLayout, queries: Tensor) -> Tensor:
    """Bool [B|1, H|Hkv|1, R, Nkv]: True where query queries[r] reads key j; those rows of layout.to_dense()."""
    row = queries // layout.q_block
    table = layout.kv_indices[:, :, row].long()
    blocks = torch.zeros(*table.shape[:3], layout.num_kv_blocks + 1, dtype=torch.bool, device=table.device)
    blocks.scatter_(3, torch.where(table < 0, layout.num_kv_blocks, table), True)
    blocks |= torch.isin(row, layout.dense_rows.long())[:, None]
    tiles = blocks[..., :-1].repeat_interleave(layout.kv_block, 3)[..., : layout.num_keys]
    mask = layout.mask
    allowed = tiles & _at(mask.q_pos, queries, mask.visible_from, torch.ge)
    allowed = allowed & _at(mask.q_pos, queries, mask.visible_until, torch.lt)
    if mask.q_doc is not None and mask.kv_doc is not None:
        allowed = allowed & _at(mask.q_doc, queries, mask.kv_doc, torch.eq)
    if mask.dense is not None:
        explicit = mask.dense[:, :, queries]
        allowed = allowed & (explicit if explicit.dtype == torch.bool else explicit > float("-inf"))
    return allowed


def dense_would_read(layout: BlockLayout, queries: Tensor) -> Tensor:
    """Bool [B|1, 1, R, N]: the tokens dense attention over the same documents reads, the query's own included.

    Causal: those up to the query. Tokens that are hidden for good (padding) don't count, nor do appended keys.
    """
    mask, tokens = layout.mask, layout.num_tokens
    visible = (mask.visible_from[:, :tokens] < ALWAYS)[:, None, None]
    if mask.causal:
        position = torch.arange(tokens, dtype=torch.int32, device=mask.device)[None]
        visible = visible & _at(mask.q_pos, queries, position, torch.ge)
    if mask.q_doc is not None and mask.kv_doc is not None:
        visible = visible & _at(mask.q_doc, queries, mask.kv_doc[:, :tokens], torch.eq)
    return visible.expand(-1, -1, len(queries), -1)


def _at(of_query: Tensor, queries: Tensor, of_key: Tensor, compare) -> Tensor:
    """compare(query's value, key's value): bool [B|1, 1, R, Nkv]."""
    return compare(of_query[:, None, queries, None], of_key[:, None, None, :])
