"""When a core with stages is dense: a function of the optimizer step alone."""

from __future__ import annotations

import pytest

from lightsparse.attention.core import AttentionShape
from lightsparse.attention.selection.stages import StagedAttention, StagedConfig


@pytest.mark.parametrize(
    ("dense_steps", "dense_from", "dense"),
    [
        (0, None, []),
        (3, None, [0, 1, 2]),
        (2, 6, [0, 1, 6, 7]),
        (0, 7, [7]),
        (-1, None, list(range(8))),
    ],
)
def test_a_core_is_dense_in_the_first_steps_and_from_a_step_on(dense_steps, dense_from, dense):
    core = StagedAttention(StagedConfig(dense_steps=dense_steps, dense_from=dense_from), AttentionShape(2, 1, 8, 16))
    assert core.dense_now == (0 in dense)  # before any set_step: that of the first step
    found = []
    for step in range(8):
        core.set_step(step, 8)
        found += [step] if core.dense_now else []
    assert found == dense
    core.set_step(0, 8)  # a run that begins again
    assert core.dense_now == (0 in dense) and not list(core.parameters()) and not core.state_dict()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dense_steps": -2}, "attention.dense_steps is -2; it counts optimizer steps"),
        ({"dense_steps": 5, "dense_from": 5}, "attention.dense_from is 5 and attention.dense_steps 5; there must be"),
        ({"dense_steps": -1, "dense_from": 5}, "attention.dense_from is 5 and attention.dense_steps -1"),
        ({"dense_from": 0}, "attention.dense_from is 0"),
    ],
)
def test_a_schedule_without_sparse_steps_in_between_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        StagedConfig(**fields)
