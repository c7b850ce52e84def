"""Parts of a layout: some of its rows, or its rows against some of the key blocks, renumbered, for ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightsparse.patterns.grid import compact
from lightsparse.patterns.layout import BlockLayout


def members(blocks: Tensor, block: int, total: int) -> Tensor:
    """Indices below `total` in the given blocks, block by block: int64 [n]; only the last block of all may be short."""
    index = blocks.long()[:, None] * block + torch.arange(block, device=blocks.device)
    return index[index < total]


def of_rows(layout: BlockLayout, rows: Tensor) -> BlockLayout:
    """The layout of some query blocks [R], ascending, and their queries; columns that only others use are dropped."""
    mask = layout.mask.of_queries(members(rows, layout.q_block, layout.num_queries))
    table = layout.kv_indices[:, :, rows]
    width = int((table >= 0).sum(-1).max()) if table.numel() else 0
    dense = torch.isin(rows, layout.dense_rows.long()).nonzero().flatten().to(torch.int32)
    return replace(layout, kv_indices=table[..., :width].contiguous(), mask=mask, dense_rows=dense)


def of_keys(layout: BlockLayout, blocks: Tensor) -> BlockLayout:
    """The layout against some key blocks [U], ascending, which become 0 … U − 1; entries for other blocks go.

    A table that names no other block keeps its entries in place, so that a block_bias still fits.
    """
    keys, mask, table = members(blocks, layout.kv_block, layout.num_keys), layout.mask, layout.kv_indices
    mask = replace(
        mask,
        visible_from=mask.visible_from[:, keys],
        visible_until=mask.visible_until[:, keys],
        kv_doc=None if mask.kv_doc is None else mask.kv_doc[:, keys],
        dense=None if mask.dense is None else mask.dense[..., keys],
        num_tokens=None,
    )
    number = torch.full((layout.num_kv_blocks,), -1, dtype=torch.int32, device=table.device)
    number[blocks.long()] = torch.arange(len(blocks), dtype=torch.int32, device=table.device)
    renumbered = torch.where(table < 0, -1, number[table.clamp(min=0).long()])
    if bool(((renumbered < 0) & (table >= 0)).any()):
        renumbered = compact(renumbered, renumbered >= 0)
    return replace(layout, kv_indices=renumbered, mask=mask)


def named_blocks(layout: BlockLayout) -> Tensor:
    """Bool [B|1, H|Hkv|1, NKVB]: the key blocks that some row reads."""
    table = layout.kv_indices.long()
    named = torch.zeros(*table.shape[:2], layout.num_kv_blocks + 1, dtype=torch.bool, device=table.device)
    named.scatter_(2, torch.where(table < 0, layout.num_kv_blocks, table).flatten(2), True)
    if len(layout.dense_rows):
        named[:] = True
    return named[..., :-1]
