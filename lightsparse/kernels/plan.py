"""Which key block sits where: neighbouring query blocks read mostly the same key blocks, so only changes are copied.

The keys of one query block stand side by side in a buffer of `width` slots. A softmax does not care about their order,
so a block that the next row reads too stays in its slot, and only new ones are loaded. A change of width moves every
slot, so neighbouring rows of nearly equal length share the longest one's width; their spare slots are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_SPARE = 0.1  # share of a row's slots that may stand empty, so that its neighbours' blocks need not move

Move = tuple[int, int, int, int]  # (table, first slot, first key block, how many): neighbours move together


@dataclass
class Step:
    """The buffer's state for one row of the table.

    slot_of    per table: {key block: slot}; valid until the next step
    spare      per table: slots without a block, when its row is shorter than `width`
    loads      what to copy in before this row
    evictions  what has to leave first, so that gradients gathered in a slot are written back
    fresh      the buffer changed its width: nothing in it is valid before the loads
    """

    row: int
    width: int
    slot_of: list[dict[int, int]]
    spare: list[list[int]]
    loads: list[Move]
    evictions: list[Move]
    fresh: bool


def steps(tables: list[list[list[int]]], reuse: bool = True) -> Iterator[Step]:
    """Steps for rows 0, 1, … of `tables[t][row]`, each a list of key blocks without padding.

    reuse=False puts entry n of a row in slot n (for a bias per table entry).
    """
    if not tables:
        return
    slot_of: list[dict[int, int]] = [{} for _ in tables]
    free: list[list[int]] = [[] for _ in tables]  # per table, the lowest slot last
    lengths = [max(map(len, rows)) for rows in zip(*tables, strict=True)]
    width = -1
    for row, new_width in enumerate(_widths(lengths) if reuse else lengths):
        fresh = new_width != width or not reuse
        loads: list[Move] = []
        evictions: list[Move] = []
        for t, table in enumerate(tables):
            held, blocks = slot_of[t], table[row]
            if fresh:
                gone = list(held.items())
                held.clear()
                free[t] = list(range(new_width - 1, -1, -1))
            else:
                wanted = set(blocks)
                gone = [(block, slot) for block, slot in held.items() if block not in wanted]
                for block, _ in gone:
                    del held[block]
                if gone:
                    free[t] = sorted([*free[t], *(slot for _, slot in gone)], reverse=True)
            evictions += _moves(t, gone)
            new = [block for block in blocks if block not in held]
            slots = free[t]
            taken = [(block, slots.pop()) for block in new]
            held.update(taken)
            loads += _moves(t, taken)
        width = new_width
        yield Step(row, width, slot_of, free, loads, evictions, fresh)


def held_moves(slot_of: list[dict[int, int]]) -> list[Move]:
    """Everything that the buffer holds."""
    return [move for t, held in enumerate(slot_of) for move in _moves(t, list(held.items()))]


def _moves(t: int, pairs: list[tuple[int, int]]) -> list[Move]:
    """(key block, slot) pairs as moves; neighbours in both become one."""
    moves: list[Move] = []
    for block, slot in pairs:
        if moves and moves[-1][1] + moves[-1][3] == slot and moves[-1][2] + moves[-1][3] == block:
            _, first_slot, first_block, count = moves[-1]
            moves[-1] = (t, first_slot, first_block, count + 1)
        else:
            moves.append((t, slot, block, 1))
    return moves


def _widths(lengths: list[int]) -> list[int]:
    """For each row the longest of its run of rows that waste at most a share _SPARE of that length."""
    widths: list[int] = []
    start = 0
    while start < len(lengths):
        least = greatest = lengths[start]
        stop = start + 1
        while stop < len(lengths):
            least, longest = min(least, lengths[stop]), max(greatest, lengths[stop])
            if least < (1 - _SPARE) * longest:
                break
            greatest = longest
            stop += 1
        widths.extend([greatest] * (stop - start))
        start = stop
    return widths
