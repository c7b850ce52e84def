"""Which file is taken for the newest checkpoint, and which are removed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightsparse.config.parse import compose
from lightsparse.training.checkpoints import callback
from lightsparse.training.checkpoints.background_writer import CheckpointWriter
from lightsparse.training.checkpoints.callback import StepCheckpoint, validation_follows
from lightsparse.training.checkpoints.files import checkpoint_steps, newest_checkpoint


def saved(folder: Path, *steps: int) -> Path:
    for step in steps:
        CheckpointWriter(False, 60).save_checkpoint({"global_step": step}, folder / f"step-{step}.ckpt")
    return folder


def test_the_newest_is_by_number_and_not_by_name(tmp_path: Path) -> None:
    assert newest_checkpoint(saved(tmp_path, 9, 1000, 200)) == (1000, tmp_path / "step-1000.ckpt")
    assert list(checkpoint_steps(tmp_path)) == [9, 200, 1000]


def test_half_written_foreign_and_damaged_files_are_never_taken(tmp_path: Path) -> None:
    saved(tmp_path, 5, 6)
    whole = (tmp_path / "step-6.ckpt").read_bytes()
    (tmp_path / "step-6.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / ".step-7.ckpt.123.partial").write_bytes(whole)
    (tmp_path / "step-8.ckpt.bak").write_bytes(whole)
    (tmp_path / "step-9.ckpt").touch()
    assert newest_checkpoint(tmp_path) == (5, tmp_path / "step-5.ckpt")


def test_no_flipped_bit_is_loaded(tmp_path: Path) -> None:
    """Each damaged file is passed over, or its flip lies where nothing is read (padding), and the content is whole."""
    saved(tmp_path, 5)
    content = {"weights": torch.arange(300.0), "global_step": 6}
    path = tmp_path / "step-6.ckpt"
    CheckpointWriter(False, 60).save_checkpoint(content, path)
    whole = path.read_bytes()
    passed_over = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        step, found = newest_checkpoint(tmp_path) or (None, None)
        if step == 5:
            passed_over += 1
            continue
        loaded = torch.load(found, weights_only=True)
        assert torch.equal(loaded["weights"], content["weights"]) and loaded["global_step"] == 6
    assert passed_over > len(whole) / 7 / 2


def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 5, 6)
    path = tmp_path / "step-6.ckpt"
    path.write_bytes(path.read_bytes()[:-40])
    with caplog.at_level("WARNING"):
        assert newest_checkpoint(tmp_path) == (5, tmp_path / "step-5.ckpt")
    assert "step-6.ckpt IS DAMAGED (no whole archive" in caplog.text


def test_no_folder_and_no_checkpoint_are_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    assert newest_checkpoint(tmp_path) is None


def test_a_failed_save_keeps_the_checkpoint_of_that_name(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    with pytest.raises(AttributeError):
        CheckpointWriter(False, 60).save_checkpoint({"local": lambda: None}, tmp_path / "step-5.ckpt")
    assert torch.load(tmp_path / "step-5.ckpt", weights_only=True) == {"global_step": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["step-5.ckpt"]


def test_validation_comes_at_its_interval_and_once_at_the_end() -> None:
    for last, steps in ((7, [3, 6, 7]), (6, [3, 6])):
        config = compose(["eval.every_n_steps=3", f"trainer.max_steps={last}"])
        assert [step for step in range(last + 1) if validation_follows(config, step)] == steps


def test_the_newest_and_the_best_stay(tiny, tmp_path):
    for step in range(1, 6):
        (tmp_path / f"step-{step}.ckpt").touch()
    config = tiny("checkpoint.keep=2")
    StepCheckpoint(config, tmp_path, CheckpointWriter(False, 1), lambda step: None)._tidy(5, 2, 1.5)
    assert list(checkpoint_steps(tmp_path)) == [2, 4, 5]


def test_a_rank_goes_on_with_its_own_random_state_and_with_none_of_other_ranks(tiny, tmp_path, monkeypatch):
    given: list[dict] = []
    monkeypatch.setattr(callback, "set_random_state", given.append)
    watch = StepCheckpoint(tiny(), tmp_path, CheckpointWriter(False, 1), lambda step: None)
    watch._random_states = [{"of": 0}, {"of": 1}]
    try:
        for world_size in (2, 3):
            watch.on_train_start(SimpleNamespace(global_step=4, world_size=world_size, global_rank=1), None)
    finally:
        watch.teardown(None, None, "fit")
    assert given == [{"of": 1}]
