"""Whether a run may begin, go on, or is done, from nothing but what lies in its directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.training.checkpoints.background_writer import CheckpointWriter
from lightsparse.training.checkpoints.lock import unlock
from lightsparse.training.checkpoints.run_directory import RunDirectory, Start

Tiny = Callable[..., Config]


@pytest.fixture
def config(tiny: Tiny) -> Config:
    return tiny("trainer.max_steps=10")


def run_at(path: Path, step: int, config: Config, *, summary: bool = False) -> RunDirectory:
    directory = RunDirectory(path)
    directory.open(config)
    directory.prepare(config)
    CheckpointWriter(False, 60).save_checkpoint({}, directory.checkpoints / f"step-{step}.ckpt")
    if summary:
        directory.summary.write_text(json.dumps({"finished": True, "steps": step}))
    return directory


def test_a_new_directory_starts_from_nothing_and_keeps_its_config(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny("resume=never")
    directory = RunDirectory.of(config)
    assert directory.path == tmp_path / "runs" / "tiny"
    assert directory.open(config) == Start(0, None)
    assert not directory.path.exists()  # something else may still be refused
    directory.prepare(config)
    assert OmegaConf.to_container(OmegaConf.load(directory.config)) == config.composed
    assert directory.checkpoints.is_dir() and directory.plots.is_dir()


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_an_unfinished_run_continues_from_its_newest_checkpoint(
    resume: str, tmp_path: Path, config: Config, tiny: Tiny
) -> None:
    directory = run_at(tmp_path, 5, config)
    again = tiny("trainer.max_steps=10", f"resume={resume}")
    assert directory.open(again) == Start(5, directory.checkpoints / "step-5.ckpt")


def test_never_refuses_a_directory_that_holds_a_run_and_names_both_ways_out(
    tmp_path: Path, config: Config, tiny: Tiny
) -> None:
    directory = run_at(tmp_path, 400, config)
    with pytest.raises(ConfigError) as refused:
        directory.open(tiny("resume=never"))
    assert str(refused.value) == (
        f"{tmp_path} already holds a run at step 400; use resume=auto to continue it or "
        "name=<another> to start beside it"
    )


def test_must_refuses_a_directory_without_a_checkpoint(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        RunDirectory(tmp_path / "new").open(tiny("resume=must"))
    assert not (tmp_path / "new").exists()


def test_another_config_is_refused_with_its_keys_and_changes_nothing(tmp_path: Path, tiny: Tiny) -> None:
    directory = run_at(tmp_path, 5, tiny("optimizer.lr=0.001"), summary=True)
    before = directory.config.read_text()
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.001 there, 0\.01 here") as refused:
        directory.open(tiny("optimizer.lr=0.01", "trainer.max_steps=20"))
    assert "seed" not in str(refused.value)
    assert directory.config.read_text() == before and directory.summary.exists()


def test_more_steps_are_no_other_config_and_the_stored_one_follows(tmp_path: Path, config: Config, tiny: Tiny) -> None:
    directory, longer = run_at(tmp_path, 10, config, summary=True), tiny("trainer.max_steps=20")
    assert directory.open(longer).step == 10
    assert directory.summary.exists() and OmegaConf.load(directory.config) == config.composed
    directory.prepare(longer)
    assert OmegaConf.load(directory.config).trainer.max_steps == 20
    assert not directory.summary.exists()  # it is not finished any more


@pytest.mark.parametrize("max_steps", [5, 10])
def test_a_finished_run_gives_its_summary_and_is_left_alone(
    max_steps: int, tmp_path: Path, config: Config, tiny: Tiny
) -> None:
    directory = run_at(tmp_path, 10, config, summary=True)
    before = directory.config.stat().st_mtime_ns
    assert directory.open(tiny(f"trainer.max_steps={max_steps}")).summary == {"finished": True, "steps": 10}
    assert directory.config.stat().st_mtime_ns == before


def test_half_written_files_are_cleaned_up_and_never_continued_from(tmp_path: Path, config: Config) -> None:
    directory = run_at(tmp_path, 5, config)
    partial = directory.checkpoints / ".step-6.ckpt.77.partial"
    partial.write_bytes((directory.checkpoints / "step-5.ckpt").read_bytes())
    assert directory.open(config).step == 5
    directory.prepare(config)
    assert not partial.exists()


def test_a_run_killed_before_its_first_checkpoint_may_start_again_with_any_config(
    tmp_path: Path, config: Config, tiny: Tiny
) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(config)
    directory.prepare(config)
    assert directory.open(tiny("seed=1")) == Start(0, None)


def test_a_run_that_another_process_began_between_looking_and_writing_is_not_overwritten(
    tmp_path: Path, config: Config, tiny: Tiny
) -> None:
    mine, theirs = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "a")
    assert mine.open(config) == theirs.open(config) == Start(0, None)
    theirs.prepare(tiny("seed=1"))
    unlock(theirs.path)  # its process has ended
    with pytest.raises(ConfigError, match=r"was started by another process .* use the same command again"):
        mine.prepare(config)
    assert OmegaConf.load(theirs.config).seed == 1
