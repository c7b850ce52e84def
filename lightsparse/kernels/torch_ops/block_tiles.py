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

    block_T      int64, ascending; of tiles left over any block that is read
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
    return _cheapest([tiles_of(readers_Y, p) for p in _PLACES], entries, sharing, keys)


def queries_per_tile_of_shape(blocks: int, entries: int, sharing: int, keys: int) -> int | None:
    """The same without a look at who reads what: by the most tiles that there can be, of lists with no end."""
    return _cheapest([most_tiles(blocks, entries, sharing, p) for p in _PLACES], entries, sharing, keys)


def _cheapest(tiles: list[int], entries: int, sharing: int, keys: int) -> int | None:
    by_query = entries * keys * (_COPY + sharing * _LONE)
    of_place = max(keys + _PLACE * (1 - keys / _FITTED), 0)  # at _FITTED keys it is in the 1
    costs = [t * (p * of_place + _TILE + keys * _COPY) for t, p in zip(tiles, _PLACES, strict=True)]
    best = min(costs)
    return _PLACES[costs.index(best)] if best <= by_query else None


def tiles_of(readers_Y: Tensor, places: int) -> int:
    """Tiles of so many places that these readers fill."""
    return int((-(-readers_Y // places)).sum())


def most_tiles(blocks: int, entries: int, sharing: int, places: int) -> int:
    """A bound on that: of each block that can have a reader one tile may not be full."""
    return min(blocks, entries) + entries * sharing // places


def readers(block_LK: Tensor, blocks: int, sharing: int) -> Tensor:
    """Queries that read each of `blocks` key blocks, from lists behind whose ends stands the number `blocks`: [Y]."""
    number = block_LK.flatten().long()
    counts = torch.zeros(blocks + 1, dtype=torch.int64, device=number.device)  # bincount would wait for the largest
    return counts.scatter_add_(0, number, torch.ones_like(number))[:blocks] * sharing


def block_tiles(block_LK: Tensor, readers_Y: Tensor, sharing: int, places: int, total: int) -> BlockTiles:
    """`total` tiles of the same lists, `tiles_of` their readers or more; query l · sharing + i reads list l."""
    device, (lists, entries), blocks = block_LK.device, block_LK.shape, len(readers_Y)
    in_order, entry = block_LK.flatten().sort(stable=True)  # behind all blocks the entries that are none

    tiles_Y = -(-readers_Y // places)
    stop_Y = tiles_Y.cumsum(0)
    first_place, first_reader = (stop_Y - tiles_Y) * places, readers_Y.cumsum(0) - readers_Y
    shift = torch.nn.functional.pad(first_place - first_reader, (0, 1))[in_order.long()][:, None]
    of_list = torch.arange(sharing, device=device)
    place = torch.arange(len(entry), device=device)[:, None] * sharing + of_list + shift
    place = torch.where(in_order[:, None] < blocks, place, total * places)

    query = torch.full((total * places + 1,), -1, device=device)  # the last is for the entries that are none
    query[place.flatten()] = ((entry // max(entries, 1))[:, None] * sharing + of_list).flatten()
    position = torch.empty((lists * entries, sharing), dtype=torch.int64, device=device)
    position[entry] = place
    position_RK = position.view(lists, entries, sharing).transpose(1, 2).reshape(lists * sharing, entries)
    tile = torch.arange(total, device=device)
    block_T = torch.searchsorted(stop_Y, tile, right=True)
    # A tile left over is the first query's again, against a block of its own list: it meets nothing it does not read.
    block_T = torch.where(tile < stop_Y[-1:], block_T, block_LK[:1, :1].flatten().clamp(max=blocks - 1))
    return BlockTiles(block_T, query[:-1].view(total, places), position_RK)
