from itertools import islice

import numpy as np
import pytest

from lightsparse.data.sampler import GlobalOrderSampler, epoch_order


def drawn(count, num_samples=13, seed=3, **fields):
    return list(islice(GlobalOrderSampler(num_samples, seed, **fields), count))


@pytest.mark.parametrize("num_samples", [1, 2, 13, 1000])
def test_every_epoch_holds_every_sample_once(num_samples):
    ids = drawn(3 * num_samples, num_samples)
    for epoch in range(3):
        part = ids[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(epoch * num_samples, (epoch + 1) * num_samples))


def test_epochs_and_seeds_have_their_own_orders():
    orders = [tuple(epoch_order(100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_is_the_same_on_every_machine_and_release():
    assert epoch_order(10, seed=42, epoch=7).tolist() == [6, 8, 7, 4, 5, 2, 9, 0, 1, 3]


def test_places_are_spread_evenly_over_epochs():
    places = np.stack([epoch_order(8, 0, epoch) for epoch in range(2000)])
    share = (places[:, 0, None] == np.arange(8)).mean(0)
    assert np.abs(share - 1 / 8).max() < 0.03


@pytest.mark.parametrize("start", [0, 1, 12, 13, 40])
def test_a_start_at_any_count_continues_the_same_order(start):
    assert drawn(30, start=start) == drawn(start + 30)[start:]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 24])
def test_ranks_together_draw_the_global_order(world, start):
    ranks = [drawn(24 // world, start=start, rank=rank, world=world) for rank in range(world)]
    assert [sample for together in zip(*ranks, strict=True) for sample in together] == drawn(start + 24)[start:]
