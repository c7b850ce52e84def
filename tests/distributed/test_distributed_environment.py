"""Which process prepares the run directory, told from the environment of each launcher."""

from __future__ import annotations

import pytest

from lightsparse.distributed.environment import _RANKS, is_first_rank

FIRST = [
    {},
    {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"},  # torchrun
    {"LOCAL_RANK": "0", "NODE_RANK": "0"},  # our launcher
    {"SLURM_PROCID": "0"},
]
OTHERS = [
    {"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"},
    {"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"},
    {"NODE_RANK": "1"},  # the process a user starts on a second node: no launcher has told it a rank yet
    {"SLURM_PROCID": "3"},
]


@pytest.mark.parametrize("environment", FIRST + OTHERS, ids=str)
def test_exactly_one_process_of_every_launcher_is_the_first(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in _RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_rank() == (environment in FIRST)
