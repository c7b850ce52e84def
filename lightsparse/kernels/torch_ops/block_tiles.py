"""Which queries read which key block: the lists of the `per_query` backend turned around.

The queries that chose a block, in tiles of equal size, meet it in one matrix product, which is fast when many chose the
same; otherwise each query's own blocks are gathered. `queries_per_tile` decides by counting, never by measuring, so the
same table is computed the same way.

Names: those of call.py, and R = queries (L · M), T = tiles, P = places of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_PLACES = (16, 32, 64, 128)  # of a tile; fewer waste the matrix product, more waste places
# What one place against one key costs is 1. Then copying a key and its value to where they are multiplied costs _COPY,
# and a query against the keys gathered for few _LONE. A tile's bookkeeping, whatever its block has keys, costs _TILE,
# and bringing a place's query and taking its part away _PLACE. Fitted on one x86 core, blocks of 64 and of 1.
_COPY, _LONE, _TILE, _PLACE, _FITTED = 4, 2, 512, 8, 64


@dataclass(frozen=True, eq=False)
class BlockTiles:
    """Tiles of queries that read one key block each, block by block, and where to find each query's parts.

    block_T      int64, ascending
    query_TP     int64: the query in each place, −1 in those left over
    position_RK  int64: place (tile · P + p) of each entry; T · P behind the end of a list
    """

    block_T: Tensor
    query_TP: Tensor
    position_RK: Tensor


def queries_per_tile(readers_Y: Tensor, entries: int, sharing: int, keys: int) -> int | None:
    """Places of a tile for walking by key block, or None where gathering for each query is cheaper.

    readers_Y  queries that read each key block, zeros included
    entries    of all lists; `sharing` queries read each list
    keys       of a block
    Of equal costs the first of (16, 32, …) wins, and it wins over gathering.
    """
    by_query = entries * keys * (_COPY + sharing * _LONE)
    of_place = max(keys + _PLACE * (1 - keys / _FITTED), 0)  # at _FITTED keys it is in the 1
    costs = [int((-(-readers_Y // p)).sum()) * (p * of_place + _TILE + keys * _COPY) for p in _PLACES]
    best = min(costs)
    return _PLACES[costs.index(best)] if best <= by_query else None


def readers(block_LK: Tensor, blocks: int, sharing: int) -> Tensor:
    """Queries that read each of `blocks` key blocks, from lists behind whose ends stands the number `blocks`: [Y]."""
    return torch.bincount(block_LK.flatten(), minlength=blocks + 1)[:blocks] * sharing


def block_tiles(block_LK: Tensor, readers_Y: Tensor, sharing: int, places: int) -> BlockTiles:
    """Tiles of the same lists; query l · sharing + i reads list l."""
    device, (lists, entries), blocks = block_LK.device, block_LK.shape, len(readers_Y)
    in_order, entry = block_LK.flatten().sort(stable=True)
    used = int(readers_Y.sum()) // sharing
    in_order, entry = in_order[:used].long(), entry[:used]

    tiles_Y = -(-readers_Y // places)
    first_place = (tiles_Y.cumsum(0) - tiles_Y) * places
    first_reader = readers_Y.cumsum(0) - readers_Y
    total = int(tiles_Y.sum())
    of_list = torch.arange(sharing, device=device)
    rank = torch.arange(used, device=device)[:, None] * sharing + of_list
    place = rank + (first_place - first_reader)[in_order][:, None]

    query = torch.full((total * places,), -1, device=device)
    query[place.flatten()] = ((entry // max(entries, 1))[:, None] * sharing + of_list).flatten()
    position = torch.full((lists * entries, sharing), total * places, device=device)
    position[entry] = place
    position_RK = position.view(lists, entries, sharing).transpose(1, 2).reshape(lists * sharing, entries)
    block_T = torch.repeat_interleave(torch.arange(blocks, device=device), tiles_Y, output_size=total)
    return BlockTiles(block_T, query.view(total, places), position_RK)
