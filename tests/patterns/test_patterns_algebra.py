"""`|` is the union and `&` the intersection of what is read, dense rows included; patterns are values."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from pattern_definitions import Case

from lightsparse.patterns import (
    AtDensity,
    BlockDilated,
    BlockGrid,
    GlobalTokens,
    Intersection,
    LocalWindow,
    Pattern,
    Strided,
    Union,
)


@dataclass(frozen=True)
class OneBlockPerHead(Pattern):
    """Query head h reads block h and the own block: a table per query head."""

    def rows(self, grid: BlockGrid) -> torch.Tensor:
        columns = torch.arange(grid.heads)[None, :, None, None].expand(1, -1, len(grid.rows), 1)
        return grid.visible(columns, also_own=True)


PARTS = [
    LocalWindow(20),
    LocalWindow(200),
    GlobalTokens(4),
    GlobalTokens(30),
    Strided(3),
    BlockDilated((64, 192), (1, 2)),
    OneBlockPerHead(),
]
CASES = [Case(111, 16, causal, packed) for causal in (True, False) for packed in (True, False)]


def read(pattern: Pattern, case: Case) -> torch.Tensor:
    dense = case.layout(pattern).to_dense()
    return dense.repeat_interleave(case.heads // dense.shape[1], 1).expand(2, -1, -1, -1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_union_and_intersection_are_those_of_the_pairs_read(case):
    of = {part: read(part, case) for part in PARTS}
    for a, b in itertools.combinations_with_replacement(PARTS, 2):
        assert torch.equal(read(a | b, case), of[a] | of[b]), (a, b)
        assert torch.equal(read(a & b, case), of[a] & of[b]), (a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nested_expressions_mean_what_they_say(case):
    a, b, c, d = (read(part, case) for part in (LocalWindow(20), GlobalTokens(4), Strided(3), GlobalTokens(30)))
    A, B, C, D = LocalWindow(20), GlobalTokens(4), Strided(3), GlobalTokens(30)
    assert torch.equal(read((A | B) & (C | D), case), (a | b) & (c | d))
    assert torch.equal(read((A & B) | (B & D) | C, case), (a & b) | (b & d) | c)
    assert torch.equal(read(Intersection((B, D, C | D)), case), b & d & (c | d))
    assert torch.equal(read(Union((A & D, Intersection((D, B)))), case), (a & d) | (d & b))


def test_rows_that_read_everything_stay_out_of_the_table():
    layout = (LocalWindow(20) | GlobalTokens(4)).layout(1000, block=16, causal=False)
    assert layout.dense_rows.tolist() == [0]
    assert (layout.kv_indices[:, :, 0] == -1).all()
    assert layout.kv_indices.shape[3] == 6  # five blocks around the own one, and the global one


@pytest.mark.parametrize("causal", [True, False])
def test_an_intersection_is_no_wider_than_its_narrowest_part(causal):
    layout = (LocalWindow(20) & GlobalTokens(40)).layout(4000, block=16, causal=causal)
    assert layout.kv_indices.shape[3] <= 5


def test_equal_patterns_are_one_key_and_different_ones_are_not():
    build = [
        lambda: LocalWindow(20),
        lambda: GlobalTokens(4),
        lambda: GlobalTokens(4, 1),
        lambda: Strided(3),
        lambda: BlockDilated((64, 192), (1, 2)),
        lambda: LocalWindow(20) | Strided(3),
        lambda: LocalWindow(20) & Strided(3),
        lambda: Strided(3) & LocalWindow(20),
        lambda: AtDensity(LocalWindow(1), 0.3),
        lambda: AtDensity(LocalWindow(1) | Strided(3), 0.3, "stride"),
    ]
    keys = {make(): n for n, make in enumerate(build)}
    assert len(keys) == len(build)
    assert [keys[make()] for make in build] == list(range(len(build)))


@pytest.mark.parametrize(
    ("from_yaml", "same"),
    [
        (Union([LocalWindow(20), Strided(3)]), LocalWindow(20) | Strided(3)),
        (Intersection([LocalWindow(20), Strided(3)]), LocalWindow(20) & Strided(3)),
        (BlockDilated([64, 192], [1, 2]), BlockDilated((64, 192), (1, 2))),
    ],
)
def test_lists_are_as_good_as_tuples(from_yaml, same):
    assert from_yaml == same and hash(from_yaml) == hash(same)


@pytest.mark.parametrize("kind", [Union, Intersection])
def test_no_parts_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}.parts is empty"):
        kind(())
