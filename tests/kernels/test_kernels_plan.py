"""The plan of moves: replayed on a model of the buffer, every row finds its blocks, and nothing moves without need."""

from __future__ import annotations

import random

import pytest

from lightsparse.kernels.plan import held_moves, steps
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, Strided


def tables_of(pattern, heads: int = 1) -> list[list[list[int]]]:
    table = pattern.layout(1000, block=16, heads=heads).kv_indices[0]
    return [[[j for j in row if j >= 0] for row in head] for head in table.tolist()]


def random_tables() -> list[list[list[int]]]:
    draw = random.Random(0)
    return [[sorted(draw.sample(range(30), draw.randint(0, 12))) for _ in range(25)] for _ in range(3)]


TABLES = {
    "window": tables_of(LocalWindow(70)),
    "mixed": tables_of(LocalWindow(40) | GlobalTokens(4) | Strided(5)),
    "per-head": tables_of(BlockDilated((128, 512), (2, 4)), heads=4),
    "random": random_tables(),
    "empty": [[[], [], []]],
}


@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("reuse", [True, False])
def test_replaying_the_moves_brings_every_row_its_blocks_and_every_gradient_home(tables, reuse) -> None:
    buffer: list[dict[int, int]] = [{} for _ in tables]  # per table: slot → block
    gathered: list[list[int]] = [[] for _ in tables]  # (rows that read block) as they are written back
    pending: list[dict[int, int]] = [{} for _ in tables]  # slot → rows added up since it was loaded
    rows = 0
    for step in steps(tables, reuse):
        for t, slot, block, count in step.evictions:
            for i in range(count):
                assert buffer[t].pop(slot + i) == block + i
                gathered[t] += [block + i] * pending[t].pop(slot + i)
        if step.fresh:
            assert not any(buffer)
        for t, slot, block, count in step.loads:
            for i in range(count):
                assert slot + i not in buffer[t]
                buffer[t][slot + i], pending[t][slot + i] = block + i, 0
        for t, table in enumerate(tables):
            assert sorted(buffer[t].values()) == table[step.row]
            assert {block: slot for slot, block in buffer[t].items()} == step.slot_of[t]
            assert sorted([*buffer[t], *step.spare[t]]) == list(range(step.width))
            if not reuse:
                assert [buffer[t][slot] for slot in range(len(table[step.row]))] == table[step.row]
            for slot in buffer[t]:
                pending[t][slot] += 1
        rows, last = rows + 1, step
    for t, slot, block, count in held_moves(last.slot_of):
        for i in range(count):
            gathered[t] += [block + i] * pending[t].pop(slot + i)
    assert rows == len(tables[0])
    assert [sorted(g) for g in gathered] == [sorted(block for row in table for block in row) for table in tables]


def test_a_window_loads_one_block_per_row_once_it_is_full() -> None:
    loads = [sum(count for *_, count in step.loads) for step in steps(TABLES["window"])]
    assert set(loads[10:]) == {1}


def test_neighbours_move_together() -> None:
    first = next(iter(steps([[[3, 4, 5, 9]]])))
    assert first.loads == [(0, 0, 3, 3), (0, 3, 9, 1)]
