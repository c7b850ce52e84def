"""Checkpoints written beside training: of the state at their step, whole or not at all, and no failure unheard."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightsparse.distributed import sharded_files
from lightsparse.training.checkpoints import background_writer as module
from lightsparse.training.checkpoints.background_writer import CheckpointLateError, CheckpointWriter
from lightsparse.training.checkpoints.files import read_checkpoint
from lightsparse.utils.atomic_files import DiskFullError


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing goes on once this is set."""
    opened, save = threading.Event(), torch.save

    def waiting(content: Any, file: Any) -> None:
        assert opened.wait(30)
        save(content, file)

    monkeypatch.setattr(module.torch, "save", waiting)
    return opened


def test_what_is_written_is_the_state_at_the_call(tmp_path: Path, gate: threading.Event) -> None:
    writer, weights, told = CheckpointWriter(True, 60), torch.arange(5.0), []
    writer.save_checkpoint({"weights": weights, "nested": [{"w": weights}]}, tmp_path / "a", lambda: told.append(1))
    weights.zero_()
    assert not (tmp_path / "a").exists() and not told
    gate.set()
    writer.finish()
    found = read_checkpoint(tmp_path / "a")
    assert torch.equal(found["weights"], torch.arange(5.0)) and torch.equal(found["nested"][0]["w"], torch.arange(5.0))
    assert told == [1]


def test_one_is_under_way_at_a_time_and_all_are_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(True, 60)
    for i in range(5):
        writer.save_checkpoint({"i": i}, tmp_path / str(i))
        assert all((tmp_path / str(before)).exists() for before in range(i))
    writer.finish()
    assert [read_checkpoint(tmp_path / str(i))["i"] for i in range(5)] == list(range(5))


def test_a_failure_is_raised_in_training_once_and_leaves_the_one_before(tmp_path: Path, monkeypatch: Any) -> None:
    writer = CheckpointWriter(True, 60)
    writer.save_checkpoint({"i": 0}, tmp_path / "a")
    writer.finish()

    def full(content: Any, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    writer.save_checkpoint({"i": 1}, tmp_path / "a")
    with pytest.raises(DiskFullError, match="could not be written: its disk has"):
        for _ in range(100):
            time.sleep(0.05)
            writer.check()
    writer.check()
    writer.finish()
    assert read_checkpoint(tmp_path / "a") == {"i": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_wait_at_the_end_is_bounded(tmp_path: Path, gate: threading.Event) -> None:
    writer = CheckpointWriter(True, 0.2)
    writer.save_checkpoint({}, tmp_path / "a")
    with pytest.raises(CheckpointLateError, match=r"after 0\.2 s \(checkpoint\.timeout\)"):
        writer.finish()
    gate.set()


def test_without_background_all_is_done_at_return(tmp_path: Path) -> None:
    told: list[int] = []
    CheckpointWriter(False, 60).save_checkpoint({"i": 1}, tmp_path / "a", lambda: told.append(1))
    assert told == [1] and read_checkpoint(tmp_path / "a") == {"i": 1}


def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="of a callback's state that weights_only does not read back; use numbers, text"
    ):
        CheckpointWriter(False, 60).save_checkpoint({"state": tmp_path}, tmp_path / "a")


def test_a_folder_is_on_disk_with_all_its_files_before_it_has_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    done: list[tuple[str, str]] = []
    sync, rename, sync_folder = os.fsync, Path.rename, module.sync_folder

    def note_sync(descriptor: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        sync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        done.append(("rename", target.name))
        return rename(path, target)

    def note_folder(folder: Path) -> None:
        done.append(("folder", folder.name))
        sync_folder(folder)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(module, "sync_folder", note_folder)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weights = distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (1,)), [Shard(0)])
        rest, shards = sharded_files.separated({"weights": weights, "step": 4}, lambda path: "weights")
        path, group = tmp_path / "step-4.ckpt", dist.group.WORLD
        CheckpointWriter(False, 60).save_shards(rest, shards, path, group, True, lambda: done.append(("then", "")))
    finally:
        dist.destroy_process_group()
    named = done.index(("rename", "step-4.ckpt"))
    partial = next(name for kind, name in done if kind == "folder")
    assert partial.endswith(".partial") and done[named - 2][0] == "folder"
    files = {path.name for path in (tmp_path / "step-4.ckpt").iterdir()}
    assert files - {".metadata"} <= {name for kind, name in done[:named] if kind == "sync"}
    assert ("folder", tmp_path.name) in done[named:] and done[-1] == ("then", "")
