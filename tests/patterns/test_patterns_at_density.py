"""AtDensity: the density asked for, within 2%, or a refusal that says what can be reached."""

import re

import pytest
import torch
from pattern_definitions import documents

from lightsparse.patterns import AtDensity, BlockDilated, GlobalTokens, LocalWindow, Strided, at_density

SOLVABLE = {
    "window": (LocalWindow(1), "window"),
    "window-and-sinks": (LocalWindow(1) | GlobalTokens(4), "window"),
    "within-an-intersection": (LocalWindow(1) & Strided(2) | Strided(16), "window"),
    "sinks": (GlobalTokens(1) | LocalWindow(1), "n"),
    "stride": (Strided(1), "stride"),
    "dilated": (BlockDilated((64, 256), (1, 2)) | LocalWindow(1), "window"),
}
TARGETS = (0.03, 0.1, 0.25, 0.5, 0.9, 1.0)
SIZES = [(63, 16), (111, 64), (1000, 16), (1000, 64), (2048, 64)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "block"), SIZES)
@pytest.mark.parametrize(("pattern", "solve"), SOLVABLE.values(), ids=SOLVABLE)
def test_the_density_is_within_two_percent_or_refused_with_the_nearest_that_can_be_reached(
    pattern, solve, n, block, causal
):
    sizes = {"block": block, "heads": 4, "kv_heads": 2, "causal": causal}
    for target in TARGETS:
        wanted = AtDensity(pattern, target, solve)
        try:
            reached = wanted.layout(n, **sizes).density()
        except at_density.OutOfReach as refused:
            named = _named_densities(str(refused))
            assert named and all(abs(density - target) > 0.02 * target for density in named)
            for density in named:  # what it names can be reached
                again = AtDensity(pattern, min(density, 1.0), solve).layout(n, **sizes).density()
                assert again == pytest.approx(density, rel=0.021)
        else:
            assert abs(reached - target) <= 0.02 * target, target


def _named_densities(sentence: str) -> list[float]:
    after = sentence.split("out of reach")[1].replace("within 2%", "")
    return [float(x) for x in re.findall(r"(?:is|are|and) (\d\.?\d*(?:e-\d+)?) ", after)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("target", [0.02, 0.1, 0.37, 0.5, 0.99])
def test_every_density_of_a_window_is_reached_where_blocks_are_many(target, causal):
    layout = AtDensity(LocalWindow(1), target).layout(8000, block=64, causal=causal)
    assert layout.density() == pytest.approx(target, rel=0.02)


def test_decoding_and_ranks_read_the_rows_of_the_whole():
    pattern = AtDensity(LocalWindow(1) | Strided(8), 0.2)
    whole = pattern.layout(1000, block=16)
    for rows in (range(0, 7), range(62, 63)):
        part = pattern.layout(1000, block=16, rows=rows)
        assert torch.equal(part.block_map(), whole.block_map()[:, :, rows.start : rows.stop])


def test_a_fixed_length_keeps_the_pattern_while_the_sequence_grows():
    pattern = AtDensity(LocalWindow(1), 0.2, at=1000)
    assert pattern.layout(1000, block=16).density() == pytest.approx(0.2, rel=0.02)
    longer, shorter = (pattern.layout(n, block=16).block_map() for n in (2000, 500))
    assert torch.equal(longer[:, :, : shorter.shape[2], : shorter.shape[3]], shorter)


def test_a_uniform_solution_is_one_value_for_all_rows():
    sparser, denser, share = AtDensity(LocalWindow(1), 0.2, uniform=True).solved(4096, block=16)
    assert sparser == denser and share == 0
    assert sparser.layout(4096, block=16).density() == pytest.approx(0.2, rel=0.02)
    with pytest.raises(ValueError, match=r"out of reach within 2%: the nearest are 0\.\d+ \(window = \d+\) and 0\.\d+"):
        AtDensity(LocalWindow(1), 0.5, uniform=True).layout(256, block=64)


def test_the_target_refers_to_one_document():
    pattern = AtDensity(LocalWindow(1), 0.2)
    packed = pattern.layout(1000, block=16, documents=documents(1000))
    plain = pattern.layout(1000, block=16)
    tiles = plain.block_map()
    assert (packed.block_map() <= tiles).all()  # the same choice, less what documents rule out


def test_tables_are_never_much_denser_than_the_target(largest_tensor):
    n, block, target = 1 << 17, 128, 0.02
    largest = largest_tensor(lambda: AtDensity(LocalWindow(1), target).layout(n, block=block))
    blocks = n // block
    assert largest <= max(8 * target * blocks * blocks / 2, 2 * n)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AtDensity(LocalWindow(1), 0.0), "AtDensity.target is 0.0"),
        (lambda: AtDensity(LocalWindow(1), 1.1), "AtDensity.target is 1.1"),
        (lambda: AtDensity(LocalWindow(1), 0.5, at=0), "AtDensity.at is 0"),
        (lambda: AtDensity(BlockDilated((64,), (1,)), 0.5), "has no integer fields of that name"),
        (lambda: AtDensity(LocalWindow(1) | LocalWindow(9), 0.5), "has 2 integer fields of that name"),
        (lambda: AtDensity(LocalWindow(1), 0.5, "segment_lengths"), "has no integer fields"),
        (
            lambda: AtDensity(LocalWindow(1), 0.01).layout(64, block=16),
            r"out of reach: the least is 0.4 \(window = 1\)",
        ),
        (lambda: AtDensity(BlockDilated((64,), (1,)) & LocalWindow(1), 0.9).layout(640, block=16), "the greatest is 0"),
    ],
)
def test_what_cannot_be_solved_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
