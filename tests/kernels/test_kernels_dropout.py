"""The decision to drop a weight depends on where it stands and on nothing else."""

import math

import pytest
import torch

from lightsparse.kernels import Dropout, sample_keys
from lightsparse.kernels.dropout import keep_scale

HEADS, QUERIES, KEYS = torch.arange(3), torch.arange(40)[None], torch.arange(50)[None, None]
KEYS_OF_SAMPLES = sample_keys(7, 2, torch.arange(4))


def kept(rate: float = 0.3, keys=KEYS_OF_SAMPLES, heads=HEADS, queries=QUERIES, columns=KEYS) -> torch.Tensor:
    return keep_scale(Dropout(rate, keys), heads, queries, columns, torch.float64)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.5, 0.9])
def test_the_rate_is_the_share_dropped_and_the_rest_is_scaled(rate):
    scale = kept(rate)
    assert scale.shape == (4, 3, 40, 50)
    values = {0.0, 1 / (1 - rate)} if rate else {1.0}
    assert set(scale.unique().tolist()) <= values
    expected_spread = math.sqrt(rate * (1 - rate) / scale.numel())
    assert (scale == 0).double().mean().item() == pytest.approx(rate, abs=4 * expected_spread + 1e-12)


def test_any_part_of_the_pairs_has_the_decisions_of_the_whole():
    whole = kept()
    part = kept(
        keys=KEYS_OF_SAMPLES[2:3], heads=torch.tensor([1]), queries=torch.arange(10, 17)[None], columns=KEYS[:, :, 5:9]
    )
    assert torch.equal(part, whole[2:3, 1:2, 10:17, 5:9])
    order = torch.randperm(50)  # gathered keys stand in any order
    assert torch.equal(kept(columns=KEYS[:, :, order]), whole[..., order])


def test_queries_and_keys_may_differ_by_sample_and_head():
    queries = torch.stack([torch.arange(40) + 3 * b for b in range(4)])
    columns = torch.stack([torch.arange(50) * (h + 1) for h in range(3)])[None]
    mixed = kept(queries=queries, columns=columns)
    for b in range(4):
        for h in range(3):
            alone = kept(
                keys=KEYS_OF_SAMPLES[b : b + 1],
                heads=HEADS[h : h + 1],
                queries=queries[b : b + 1],
                columns=columns[:, h : h + 1],
            )
            assert torch.equal(mixed[b, h], alone[0, 0])


@pytest.mark.parametrize("axis", range(4))
def test_neighbours_along_every_axis_decide_independently(axis):
    dropped = (kept(0.5) == 0).double().transpose(axis, 0).flatten(1)
    agreement = (dropped[1:] == dropped[:-1]).double().mean().item()
    assert agreement == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(dropped[1:].numel()))


def test_samples_layers_and_seeds_have_keys_of_their_own():
    keys = torch.cat([sample_keys(seed, layer, torch.arange(100)) for seed in range(5) for layer in range(5)])
    assert keys.dtype == torch.int64 and len(keys.unique()) == 2500
    assert torch.equal(sample_keys(3, 1, torch.tensor([8, 9]))[1:], sample_keys(3, 1, torch.tensor([9])))
