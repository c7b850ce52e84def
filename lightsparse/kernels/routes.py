"""Which queries read which key block: the plan of the `routed` backend, made from a table with a row per query.

Turned around, the table of some rows says for each key block which of them chose it. Those queries, in tiles of equal
size, meet their block in one matrix product, which is fast when many chose the same; otherwise each query's own blocks
are gathered. `cheapest` decides by counting, never by measuring, so the same table is computed the same way.

Names: R = rows (query heads of tokens), g = rows that share one list of blocks, K = entries of a list, T = tiles,
M = slots of a tile, Y = key blocks of all samples and key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SLOTS = (16, 32, 64, 128)  # of a tile; fewer waste the matrix product, more waste slots
# What one slot against one key costs is 1. Then copying a key and its value to where they are multiplied costs _COPY,
# and a row against the keys gathered for few _LONE. A tile's bookkeeping, whatever its block has keys, costs _TILE, and
# bringing a slot's query and taking its part away _SLOT. Fitted on one x86 core, blocks of 64 and of 1.
_COPY, _LONE, _TILE, _SLOT, _FITTED = 4, 2, 512, 8, 64


@dataclass(frozen=True, eq=False)
class Routes:
    """Tiles of rows that read one key block each, block by block, and where to find each row's parts.

    block     int64 [T], ascending
    row       int64 [T, M]: the row in each slot, −1 in those left over
    position  int64 [R, K]: slot (tile · M + place) of each entry; T · M where a list ends early
    """

    block: Tensor
    row: Tensor
    position: Tensor


def slots_by_block(counts_Y: Tensor, key_lists: int, sharing: int, keys: int) -> int | None:
    """Slots of a tile for walking by key block, or None where gathering for each query is cheaper.

    counts_Y   rows that read each key block, zeros included
    key_lists  entries of all lists; `sharing` rows read each list
    keys       of a block
    Of equal costs the first of (16, 32, …) wins, and it wins over gathering.
    """
    by_query = key_lists * keys * (_COPY + sharing * _LONE)
    of_slot = max(keys + _SLOT * (1 - keys / _FITTED), 0)  # at _FITTED keys it is in the 1
    costs = [int((-(-counts_Y // m)).sum()) * (m * of_slot + _TILE + keys * _COPY) for m in _SLOTS]
    best = min(costs)
    return _SLOTS[costs.index(best)] if best <= by_query else None


def counts(block_RK: Tensor, blocks: int, sharing: int) -> Tensor:
    """Rows that read each of `blocks` key blocks, from lists [lists, K] whose ends hold the number `blocks`."""
    return torch.bincount(block_RK.flatten(), minlength=blocks + 1)[:blocks] * sharing


def routes(block_LK: Tensor, counts_Y: Tensor, sharing: int, slots: int) -> Routes:
    """Routes of lists [L, K] of key blocks, the number of blocks marking an end; row l · sharing + i reads list l."""
    device, (lists, entries), blocks = block_LK.device, block_LK.shape, len(counts_Y)
    in_order, entry = block_LK.flatten().sort(stable=True)
    used = int(counts_Y.sum()) // sharing
    in_order, entry = in_order[:used].long(), entry[:used]

    tiles_Y = -(-counts_Y // slots)
    first_slot = (tiles_Y.cumsum(0) - tiles_Y) * slots
    first_entry = counts_Y.cumsum(0) - counts_Y
    total = int(tiles_Y.sum())
    rank = torch.arange(used, device=device)[:, None] * sharing + torch.arange(sharing, device=device)
    slot = rank + (first_slot - first_entry)[in_order][:, None]

    row = torch.full((total * slots,), -1, device=device)
    of_list = (entry // entries if entries else entry)[:, None] * sharing + torch.arange(sharing, device=device)
    row[slot.flatten()] = of_list.flatten()
    position = torch.full((lists * entries, sharing), total * slots, device=device)
    position[entry] = slot
    position = position.view(lists, entries, sharing).transpose(1, 2).reshape(lists * sharing, entries)
    block = torch.repeat_interleave(torch.arange(blocks, device=device), tiles_Y, output_size=total)
    return Routes(block, row.view(total, slots), position)
