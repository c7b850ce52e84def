"""A schedule's whole meaning is its curve: where it starts, peaks and ends, at any number of steps."""

from __future__ import annotations

import math

import pytest
import torch

from lightsparse.optim.schedules import WSD, Constant, Cosine, Schedule

EVERY = [Constant(warmup_steps=10), Cosine(warmup_steps=10, final_share=0.1), WSD(warmup_steps=10, final_share=0.1)]


@pytest.mark.parametrize("schedule", EVERY, ids=lambda schedule: type(schedule).__name__)
def test_warmup_is_a_straight_line_that_ends_at_the_base_rate(schedule: Schedule) -> None:
    assert [schedule.factor(step, 100) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("schedule", EVERY, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("max_steps", [1, 2, 5, 10, 11, 12, 100])
def test_factors_stay_above_zero_and_at_most_one(schedule: Schedule, max_steps: int) -> None:
    factors = [schedule.factor(step, max_steps) for step in range(max_steps)]
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("schedule", EVERY[1:], ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("max_steps", [13, 100, 1000])
def test_decay_never_rises_and_ends_at_the_final_share(schedule: Schedule, max_steps: int) -> None:
    factors = [schedule.factor(step, max_steps) for step in range(10, max_steps)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(0.1)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert Cosine(warmup_steps=0, final_share=0.2).factor(50, 101) == pytest.approx(0.6)


def test_wsd_is_flat_until_the_decay_share_and_linear_after_it() -> None:
    factors = [WSD(warmup_steps=5, decay_share=0.2, final_share=0.0).factor(step, 100) for step in range(100)]
    assert factors[5:80] == [1.0] * 75
    assert factors[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])


def test_lambda_lr_follows_the_schedule_step_by_step() -> None:
    schedule = Cosine(warmup_steps=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, 9))
    for step in range(9):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * schedule.factor(step, 9))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Constant(warmup_steps=-1), "warmup_steps is -1"),
        (lambda: Cosine(final_share=1.5), "final_share is 1.5"),
        (lambda: WSD(decay_share=-0.1), "decay_share is -0.1"),
        (lambda: WSD(final_share=math.nan), "final_share is nan"),
    ],
)
def test_wrong_values_are_refused_by_name(build, field: str) -> None:
    with pytest.raises(ValueError, match=f"schedule.{field}"):
        build()
