"""Which key block sits where: neighbouring query blocks read mostly the same key blocks, so only changes are copied.

The keys of one query block stand side by side in a buffer of `width` slots. A softmax does not care about their order,
so a block that the next row reads too stays in its slot, and only new ones are loaded. A change of width moves every
slot, so neighbouring rows of nearly equal length share the longest one's width; their spare slots are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_SPARE = 0.1  # share of a row's slots that may stand empty, so that its neighbours' blocks need not move


@dataclass
class Step:
    """The buffer's state for one row of the table.

    slot_of   per table t: {key block: slot}
    loads     int64 [3, n]: (table, slot, key block) to copy in before this row
    evictions int64 [3, n]: what has to leave first, so that gradients gathered in a slot are written back
    fresh     the buffer changed its width: nothing in it is valid before the loads
    """

    row: int
    width: int
    slot_of: list[dict[int, int]]
    loads: Tensor
    evictions: Tensor
    fresh: bool


def steps(tables: list[list[list[int]]], reuse: bool = True) -> Iterator[Step]:
    """Steps for rows 0, 1, … of `tables[t][row]`, each a list of key blocks without padding.

    reuse=False puts entry n of a row in slot n (for a bias per table entry).
    """
    if not tables:
        return
    slot_of: list[dict[int, int]] = [{} for _ in tables]
    lengths = [max(len(table[row]) for table in tables) for row in range(len(tables[0]))]
    width = -1
    for row, new_width in enumerate(_widths(lengths) if reuse else lengths):
        rows = [table[row] for table in tables]
        fresh = new_width != width or not reuse
        loads: list[tuple[int, int, int]] = []
        evictions: list[tuple[int, int, int]] = []
        for t, blocks in enumerate(rows):
            held = slot_of[t]
            wanted = {} if fresh else dict.fromkeys(blocks)
            gone = [block for block in held if block not in wanted]
            evictions.extend((t, held[block], block) for block in gone)
            for block in gone:
                del held[block]
            if fresh:
                free: list[int] = list(range(new_width - 1, -1, -1))
            else:
                free = sorted(set(range(new_width)) - set(held.values()), reverse=True)
            for block in blocks:
                if block not in held:
                    held[block] = slot = free.pop()
                    loads.append((t, slot, block))
        width = new_width
        yield Step(row, width, slot_of, _columns(loads), _columns(evictions), fresh)


def _widths(lengths: list[int]) -> list[int]:
    """For each row the longest of its run of rows that waste at most a share _SPARE of that length."""
    widths: list[int] = []
    start = 0
    while start < len(lengths):
        least = greatest = lengths[start]
        stop = start + 1
        while stop < len(lengths):
            least, greatest = min(least, lengths[stop]), max(greatest, lengths[stop])
            if least < (1 - _SPARE) * greatest:
                greatest = max(lengths[start:stop])
                break
            stop += 1
        widths.extend([greatest] * (stop - start))
        start = stop
    return widths


def _columns(triples: list[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(triples, dtype=torch.int64).reshape(-1, 3).t()
