"""Ranks that were given different configs or folders refuse to train: all of them, with the key, before any writes."""

import pytest
import torch.distributed as dist

from lightsparse.config.targets import ConfigError
from lightsparse.training import same_config_check
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.same_config_check import begin_together, values_to_agree_on


@pytest.fixture
def second_rank(monkeypatch):
    """second_rank(mine, theirs, …): what this process and another one give, each time the ranks gather."""

    def use(*pairs, first=True, rank=0, told=None):
        given = iter(pairs)

        def gather(into, value, group):
            mine, theirs = next(given)
            into[:] = [value if mine is None else mine, theirs]

        def broadcast(values, src, group):
            values[:] = values if rank == src else [told]

        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "all_gather_object", gather)
        monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
        monkeypatch.setattr(same_config_check, "is_first_rank", lambda: first)

    return use


def values(config, **changed):
    return values_to_agree_on(config, RunDirectory.of(config), 0, "f00d") | changed


@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer.max_steps", 5), ("name", "x-12-00-01"), ("run directory", "/b/x"), ("fingerprint of the data", "beef")],
)
def test_another_value_on_another_rank_is_refused_before_anything_is_written(second_rank, tiny, key, value):
    mine = values(tiny())
    second_rank((None, mine | {key: value}))
    with pytest.raises(ConfigError) as refused:
        begin_together(mine, lambda: pytest.fail("has prepared the directory"))
    assert str(refused.value).startswith(f"rank 1 has {key}={value} and rank 0 has {key}={mine[key]}; ")


def test_a_relative_runs_dir_means_another_folder_in_another_working_directory(tiny, tmp_path, monkeypatch):
    config = tiny("runs_dir=runs", "threads=2")
    monkeypatch.chdir(tmp_path)
    here = values(config)
    assert here["run directory"] == str(tmp_path / "runs" / "tiny") and "threads" not in here
    monkeypatch.chdir("/")
    assert values(config) != here
    assert values(tiny(f"runs_dir={tmp_path}/runs", "threads=1")) == here


def test_a_rank_that_does_not_see_the_folder_is_named_where_it_would_write_there(second_rank, tiny, tmp_path):
    mine, seen = values(tiny()), tmp_path / "run_id"
    second_rank((None, mine), (None, None))
    with pytest.raises(ConfigError, match=r"rank 1 does not see .*run_id, which rank 0 has written"):
        begin_together(mine, lambda: seen.write_text("1"), seen)
    second_rank((None, mine), (None, b"1"))
    begin_together(mine, lambda: seen.write_text("1"), seen)


def test_what_the_first_rank_is_refused_every_rank_says(second_rank, tiny, monkeypatch):
    mine = values(tiny())

    def refuse():
        raise ConfigError("is being written by process 7")

    second_rank((None, mine))
    with pytest.raises(ConfigError, match="is being written by process 7"):
        begin_together(mine, refuse)
    second_rank((None, mine), first=False, rank=1, told="is being written by process 7")
    with pytest.raises(ConfigError, match="is being written by process 7"):
        begin_together(mine, lambda: pytest.fail("has prepared the directory"))


def test_a_process_that_would_write_without_being_the_first_is_refused(second_rank, tiny):
    second_rank(first=False)
    with pytest.raises(ConfigError, match="whether it is the first rank"):
        begin_together(values(tiny()), lambda: pytest.fail("has prepared the directory"))
