"""Ranks that were given different configs refuse to train, all of them and with the key."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from lightsparse.config.targets import ConfigError
from lightsparse.training.same_config_check import SameConfig


@pytest.fixture
def second_rank(monkeypatch):
    """Gathering gives this rank's values, and others on rank 1."""

    def use(**changed):
        def gather(into, values):
            into[:] = [values, values | changed]

        monkeypatch.setattr(dist, "all_gather_object", gather)

    return use


COMPOSED = {"seed": 1, "threads": 2, "trainer": {"max_steps": 4}}
PAIR = SimpleNamespace(world_size=2)


def test_another_value_on_another_rank_is_refused_with_key_and_values(second_rank):
    second_rank(**{"trainer.max_steps": 5})
    with pytest.raises(ConfigError, match=r"^rank 1 has trainer\.max_steps=5 and rank 0 has trainer\.max_steps=4; "):
        SameConfig(COMPOSED, 0).setup(PAIR, None, "fit")


def test_threads_may_differ_between_machines(second_rank):
    second_rank()
    SameConfig(COMPOSED, 0).setup(PAIR, None, "fit")
    assert "threads" not in SameConfig(COMPOSED, 0).values
