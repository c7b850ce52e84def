import pytest

from lightsparse.bench.choice import KINDS, pattern_at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(("seq", "block"), [(4096, 64), (1000, 32)])
def test_achieved_density_is_on_the_wanted_side_and_near(kind, density, seq, block):
    above = pattern_at(kind, density, seq, block).layout(seq, block=block).density()
    below = pattern_at(kind, density, seq, block, at_most=True).layout(seq, block=block).density()
    sparsest = pattern_at(kind, 1e-9, seq, block).layout(seq, block=block).density()
    assert density <= above <= max(1.04 * density, 1.2 * sparsest)
    assert below <= max(density, 1.2 * sparsest)
    assert below >= 0.96 * density


def test_the_sparsest_pattern_stands_for_a_density_out_of_reach():
    assert pattern_at("window", 0.01, 256, 64).layout(256, block=64).density() == pytest.approx(4 / 10)


@pytest.mark.parametrize(("kind", "density"), [("diagonal", 0.5), ("window", 0.0), ("window", 1.5)])
def test_unknown_kinds_and_impossible_densities_are_refused(kind, density):
    with pytest.raises(ValueError, match=r"diagonal|density is"):
        pattern_at(kind, density, 256, 64)
