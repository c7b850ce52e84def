"""The one hash: known values, tensors equal to integers, and bits that look random where decisions are made."""

import math

import pytest
import torch

from lightsparse.utils.hashing import chain, mix, mixed, signed, uniform

WORD = (1 << 64) - 1


def splitmix64(seed: int) -> int:
    """The generator's first output for a seed, from its publication."""
    z = (seed + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_the_finaliser_is_splitmix64():
    # The published test vector of SplitMix64: the first output for seed 1234567.
    assert splitmix64(1234567) == 6457827717110365317
    assert mixed(1234567) == 6457827717110365317 >> 1
    seeds = torch.tensor([0, 1, 1234567, 2**62, -1, -(2**63)])
    gamma = signed(0x9E3779B97F4A7C15)
    assert mix(seeds + gamma).tolist() == [signed(splitmix64(seed & WORD)) for seed in seeds.tolist()]


@pytest.mark.parametrize("word", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_signed_keeps_the_bits(word):
    assert signed(word) & WORD == word and -(2**63) <= signed(word) < 2**63


def test_mixed_is_a_spread_non_negative_int64_that_tells_order_and_count_apart():
    numbers = [mixed(a, b) for a in range(-20, 20) for b in range(20)]
    assert len(set(numbers)) == 800 and all(0 <= n < 2**63 for n in numbers)
    assert mixed(1, 2) != mixed(2, 1) and len({mixed(), mixed(0), mixed(0, 0)}) == 3
    assert 0.45 < sum(n >= 2**62 for n in numbers) / 800 < 0.55


def test_chain_broadcasts_and_tells_order_apart():
    a, b = torch.arange(30)[:, None], torch.arange(40)[None]
    bits = chain(5, a, b)
    assert bits.shape == (30, 40) and bits.dtype == torch.int64
    assert len(bits.unique()) == 1200
    assert torch.equal(bits[3, 7], chain(5, torch.tensor(3), torch.tensor(7)))
    assert torch.equal(chain(torch.tensor([5, 6])[:, None, None], a, b)[0], bits)
    assert not torch.equal(chain(5, a, b), chain(5, b, a))
    assert not torch.equal(chain(5, a, b), chain(6, a, b))
    assert torch.equal(chain(5, a.int(), b.short()), bits)  # whatever integer dtype holds the numbers


def test_chain_takes_any_mixed_key_and_any_int64():
    extremes = torch.tensor([-(2**63), -1, 0, 2**63 - 1])
    assert len(chain(2**63 - 1, extremes).unique()) == 4


def test_every_bit_is_set_half_of_the_time_and_flips_half_of_the_time_when_a_number_moves_by_one():
    n = 4096
    bits = chain(mixed(3), torch.arange(n))
    moved = chain(mixed(3), torch.arange(n) + 1)
    spread = 5 * 0.5 / math.sqrt(n)
    for position in range(64):
        bit, other = (bits >> position) & 1, (moved >> position) & 1
        assert abs(bit.double().mean().item() - 0.5) < spread
        assert abs((bit != other).double().mean().item() - 0.5) < spread


def test_uniform_fills_the_unit_interval_and_never_reaches_one():
    values = uniform(chain(1, torch.arange(100_000)))
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    assert values.double().mean().item() == pytest.approx(0.5, abs=0.005)
    counts = torch.histc(values, 20, 0, 1)
    assert (counts - 5000).abs().max() < 5 * math.sqrt(5000)
    assert uniform(torch.tensor([-1])).item() == 1 - 2**-24 and uniform(torch.tensor([0])).item() == 0


def test_hashing_consumes_no_generator_state():
    state = torch.get_rng_state()
    uniform(chain(mixed(1, 2), torch.arange(10)))
    assert torch.equal(torch.get_rng_state(), state)
