"""Which steps are not taken, and when a run ends over them."""

from __future__ import annotations

import math

import pytest

from lightsparse.config.schema import HealthConfig
from lightsparse.training.health import Health


def health(skip_steps: int = 2, spike: float | None = None, spike_window: int = 3) -> Health:
    return Health(HealthConfig(skip_steps, spike, spike_window))


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_a_number_is_objected_to_and_counted(loss: float, norm: float) -> None:
    judge = health()
    assert judge.objection(1.0, 1.0) is None
    assert "is nan" in (reason := judge.objection(loss, norm) or "") or "is inf" in reason
    assert (judge.skipped, judge.in_a_row, judge.is_over) == (1, 1, False)


def test_a_good_step_ends_the_row_and_only_a_row_ends_the_run() -> None:
    judge = health(skip_steps=2)
    for _ in range(5):
        judge.objection(math.nan, 1.0), judge.objection(math.nan, 1.0)
        assert not judge.is_over
        judge.objection(1.0, 1.0)
    for _ in range(3):
        judge.objection(math.nan, 1.0)
    assert judge.is_over and judge.skipped == 13


def test_a_spike_is_measured_against_the_mean_of_the_steps_that_were_taken() -> None:
    judge = health(spike=2.0)
    for loss in (9.0, 9.0, 99.0):
        assert judge.objection(loss, 1.0) is None  # nothing is usual yet
    for loss in (1.0, 2.0, 3.0):
        assert judge.objection(loss, 1.0) is None
    assert judge.objection(4.0, 1.0) is None  # twice the mean is not above it
    assert judge.objection(6.1, 1.0) == "the loss is 6.1, 2.03 times the mean of the last 3 steps"
    assert judge.objection(6.1, 1.0) is not None  # the first spike has not raised the mean
    assert health(spike=None).objection(1e9, 1.0) is None


def test_a_continued_run_judges_like_an_uninterrupted_one() -> None:
    losses = [1.0, 2.0, math.nan, 1.5, 9.0, 1.0, 3.9, math.nan]
    whole, first, second = (health(spike=2.0) for _ in range(3))
    expected = [whole.objection(loss, 1.0) for loss in losses]
    begun = [first.objection(loss, 1.0) for loss in losses[:5]]
    second.load_state_dict(first.state_dict())
    assert begun + [second.objection(loss, 1.0) for loss in losses[5:]] == expected
    assert second.state_dict() == whole.state_dict()
