"""Every token has one owner; the three splits are what they say; balanced is even."""

from __future__ import annotations

import random

import pytest
import torch

from lightsparse.context_parallel.split import Split, imbalance, split

KINDS = ("contiguous", "head_tail", "balanced")
SIZES = [(64, 8, 4), (111, 4, 3), (1000, 16, 7), (63, 1, 2), (17, 1, 8), (129, 64, 1)]  # length, unit, world


@pytest.mark.parametrize(("length", "unit", "world"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_one_owner_and_every_rank_a_token(kind, length, unit, world):
    parts = split(kind, length, unit, world)
    held = [parts.tokens(rank).tolist() for rank in range(world)]
    assert sorted(token for tokens in held for token in tokens) == list(range(length))
    assert all(tokens and tokens == sorted(tokens) for tokens in held)
    assert parts.world == world and parts.counts == tuple(map(len, held))


@pytest.mark.parametrize(("length", "unit", "world"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_units_are_never_cut(kind, length, unit, world):
    rank_of = split(kind, length, unit, world).rank_of.tolist()
    assert all(rank_of[token] == rank_of[token - token % unit] for token in range(length))


@pytest.mark.parametrize(("length", "unit", "world"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_row_of_is_a_tokens_place_on_its_rank(kind, length, unit, world):
    parts = split(kind, length, unit, world)
    for token in range(length):
        assert parts.tokens(int(parts.rank_of[token]))[parts.row_of[token]] == token


def test_blocks_are_those_of_the_ranks_tokens():
    parts = split("head_tail", 100, 8, 3)  # 13 units; the last one is of 4 tokens
    for rank in range(3):
        assert parts.blocks(rank, 4).tolist() == sorted({token // 4 for token in parts.tokens(rank).tolist()})


def test_contiguous_is_one_run_per_rank():
    assert split("contiguous", 63, 9, 3).owners == (0, 0, 1, 1, 2, 2, 2)


@pytest.mark.parametrize(("length", "unit", "world"), [(128, 8, 4), (1000, 4, 5), (111, 3, 2)])
def test_contiguous_ranks_ascend_and_differ_by_one_unit_at_most(length, unit, world):
    owners = split("contiguous", length, unit, world).owners
    units = [owners.count(rank) for rank in range(world)]
    assert list(owners) == sorted(owners)
    assert max(units) - min(units) <= 1


def test_head_tail_is_a_run_and_its_mirror_image():
    assert split("head_tail", 80, 10, 4).owners == (0, 1, 2, 3, 3, 2, 1, 0)
    assert split("head_tail", 75, 10, 2).owners == (0, 0, 1, 1, 1, 1, 0, 0)


@pytest.mark.parametrize("units", [8, 10, 40, 63])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_balanced_is_contiguous_for_equal_loads(world, units):
    contiguous = split("contiguous", 16 * units, 16, world)
    assert split("balanced", 16 * units, 16, world) == contiguous
    assert split("balanced", 16 * units, 16, world, loads=[3.0] * units) == contiguous


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_balanced_is_head_tail_for_loads_that_grow_with_the_position(world):
    loads = [unit + 0.5 for unit in range(32 * world)]  # the rows of a dense causal layout
    balanced, head_tail = (split(kind, 64 * len(loads), 64, world, loads) for kind in ("balanced", "head_tail"))
    for rank in range(world):  # the ranks' numbers are of no account
        other = int(head_tail.rank_of[balanced.tokens(rank)[0]])
        assert torch.equal(balanced.tokens(rank), head_tail.tokens(other))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_balanced_is_within_a_tenth_of_even_on_random_loads(world, seed):
    draw = random.Random(seed)
    loads = [draw.uniform(0.1, 10.0) for _ in range(64 * world)]
    contiguous, balanced = (split(kind, len(loads), 1, world, loads).owners for kind in ("contiguous", "balanced"))
    assert imbalance(balanced, loads, world) <= 1.1
    assert imbalance(balanced, loads, world) <= imbalance(contiguous, loads, world)


def test_balanced_spreads_one_heavy_region():
    loads = [1.0] * 96 + [20.0] * 32  # contiguous: the last of four ranks holds 87% of the load
    owners = split("balanced", 128, 1, 4, loads).owners
    assert imbalance(split("contiguous", 128, 1, 4).owners, loads, 4) > 3.4
    assert imbalance(owners, loads, 4) <= 1.05


def test_imbalance_is_the_busiest_rank_over_the_mean():
    assert imbalance([0, 0, 1, 1], [1, 2, 3, 6], 2) == pytest.approx(9 / 6)
    assert imbalance([0, 1], [0, 0], 2) == 1.0


def test_equal_splits_are_equal_and_hash_alike():
    one, other = split("head_tail", 111, 4, 3), split("head_tail", 111, 4, 3)
    assert one == other and hash(one) == hash(other)
    assert one != split("contiguous", 111, 4, 3)
    assert one == Split(111, 4, one.owners)


def test_errors_name_the_field_and_the_way_out():
    with pytest.raises(ValueError, match=r"strategy.split is 'zigzag'; it must be one of contiguous, head_tail, balan"):
        split("zigzag", 64, 8, 2)
    with pytest.raises(ValueError, match="the unit of a split is 0; it counts tokens and must be at least 1"):
        split("contiguous", 64, 0, 2)
    with pytest.raises(ValueError, match="loads has 3 entries for 8 units; it needs one for each"):
        split("balanced", 64, 8, 2, loads=[1.0] * 3)
    with pytest.raises(
        ValueError, match=r"data.context is 60, that is 4 units of 16 tokens.*needs 8: lengthen data.con"
    ):
        split("head_tail", 60, 16, 4)


@pytest.mark.parametrize(("kind", "world"), [("contiguous", 10), ("head_tail", 5), ("balanced", 10)])
def test_the_length_that_the_refusal_names_is_enough(kind, world):
    with pytest.raises(ValueError, match=r"9 units of 7 tokens.*needs 10: lengthen data.context to 70, or "):
        split(kind, 61, 7, world)
    assert split(kind, 70, 7, world).world == world
