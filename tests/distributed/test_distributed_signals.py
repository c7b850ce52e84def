"""Ranks that are asked to stop, whichever gets the signal, save one step together, end with 75, and change no bit."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1
from typing import Any

import pytest
import torch
from rank_forks import Event, Job
from rank_runs import words

from lightsparse.training.checkpoints.files import checkpoint_path, checkpoint_steps, newest_checkpoint, read_checkpoint
from lightsparse.training.metrics.metrics_file import read_metrics

pytestmark = pytest.mark.multiprocess

STEPS = 12
TIMINGS = {"wall_s", "tokens_per_s", "flops_per_s", "dense_flops_per_s", "mfu"}
COMMON = (
    "strategy=context",
    "data.batch_size=2",
    "optimizer=adamw",
    "checkpoint.every_n_steps=100",
    "checkpoint.keep=100",
    "checkpoint.keep_best=false",
    "eval.every_n_steps=3",
    f"trainer.max_steps={STEPS}",
)
TWO = ("--nproc-per-node=2",)


def start(folder: Path, name: str, *events: Event, torchrun: Sequence[str] | None = None) -> Job:
    more = ("trainer.devices=2",) if torchrun is None else ()
    return Job(folder / f"log-{name}", *words(folder, f"name={name}", *COMMON, *more), torchrun=torchrun, events=events)


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    table = read_metrics(folder / "runs" / name / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in table]


def last(folder: Path, name: str) -> dict[str, Any]:
    return read_checkpoint(checkpoint_path(folder / "runs" / name / "checkpoints", STEPS))


def assert_same_end(folder: Path, name: str) -> None:
    assert rows(folder, name) == rows(folder, "whole")
    ours, theirs = last(folder, name), last(folder, "whole")
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    assert ours["DataModule"] == theirs["DataModule"]
    assert (folder / "runs" / name / "summary.json").exists()


def assert_stopped_at(step: int, folder: Path, name: str, saved: set[int], log: str) -> None:
    """Besides those that were `saved` before, there is one checkpoint more, a whole one of `step`, and every row."""
    checkpoints = folder / "runs" / name / "checkpoints"
    assert set(checkpoint_steps(checkpoints)) - saved == {step}, log
    newest = newest_checkpoint(checkpoints)
    assert newest is not None and newest[0] == step
    assert not list((folder / "runs" / name).rglob("*.partial"))
    assert [row["step"] for row in rows(folder, name)] == list(range(step + 1))
    assert f"the same command continues from step {step}" in log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    assert start(folder, "whole").wait() == 0
    return folder


def test_ranks_that_the_first_one_starts_stop_together(folder: Path) -> None:
    stops = [
        ((Event(1, "forward", 2, SIGTERM),), 2),
        ((Event(0, "agreeing", 1, SIGTERM),), 4),  # too late for step 3: the ranks have just agreed to go on
        ((Event(0, "backward", 1, SIGTERM), Event(1, "optimizer", 1, SIGTERM)), 5),
        ((Event(1, "validation", 1, SIGUSR1),), 6),
        ((Event(0, "forward", 2, SIGINT, "group"),), 8),  # as Ctrl-C does
        ((Event(0, "forward", 2, SIGHUP, "group"),), 10),  # as the end of a terminal does
    ]
    saved: set[int] = set()
    for events, step in stops:
        job = start(folder, "parts", *events)
        code, log = job.wait(), job.log.read_text()
        assert (code, job.codes) == (75, {1: 75}), (events, log)
        assert_stopped_at(step, folder, "parts", saved, log)
        job.log.unlink()
        saved.add(step)
    # Before the first step and after the last one there is nothing to save.
    outside = [
        Event(0, "data", 1, SIGTERM),
        Event(0, "meeting", 1, SIGTERM),  # rank 1 would wait for it in vain
        Event(1, "starting", 1, SIGTERM),
        Event(0, "ending", 1, SIGTERM),
    ]
    for event in outside:
        job = start(folder, "parts", event)
        code, log = job.wait(), job.log.read_text()
        assert code == 75 and "outside of the training steps" in log and "Traceback" not in log, (event, log)
        assert not (folder / "runs" / "parts" / "summary.json").exists()
        assert set(checkpoint_steps(folder / "runs" / "parts" / "checkpoints")) <= saved | {STEPS}
        job.log.unlink()
    assert start(folder, "parts").wait() == 0
    assert_same_end(folder, "parts")


def test_a_second_ctrl_c_ends_all_ranks_at_once(folder: Path) -> None:
    again = Event(0, "forward", 3, SIGINT, "group")
    job = start(folder, "twice", again, again)
    assert job.wait() == 1
    assert not list((folder / "runs" / "twice" / "checkpoints").iterdir())


def test_ranks_of_torchrun_stop_together_and_so_it_does(folder: Path) -> None:
    stops = [
        (Event(1, "forward", 2, SIGTERM), 2),
        (Event(0, "validation", 1, SIGTERM, "parent"), 3),  # the agent hands it on
        (Event(1, "backward", 2, SIGINT, "parent"), 5),
    ]
    saved: set[int] = set()
    for event, step in stops:
        job = start(folder, "agent", event, torchrun=TWO)
        code, log = job.wait(), job.log.read_text()
        assert code == 1 and job.codes == {0: 75, 1: 75}, (event, code, job.codes, log)
        assert_stopped_at(step, folder, "agent", saved, log)
        job.log.unlink()
        saved.add(step)
    assert start(folder, "agent", torchrun=TWO).wait() == 0
    assert_same_end(folder, "agent")


def test_torchrun_starts_preempted_and_lost_ranks_again(folder: Path) -> None:
    stopped, lost = Event(1, "forward", 3, SIGTERM), Event(0, "backward", 3, SIGKILL, attempt=1)
    job = start(folder, "elastic", stopped, lost, torchrun=(*TWO, "--max-restarts=2"))
    code, log = job.wait(), job.log.read_text()
    assert code == 0 and job.codes == {0: 0, 1: 0}, log
    assert log.count("elastic continues from step 3 ") == 2 and "has lost another rank" in log, log
    assert_same_end(folder, "elastic")


@pytest.mark.parametrize(
    ("number", "moment", "requeued"),
    [(SIGUSR1, "forward", True), (SIGUSR1, "data", True), (SIGTERM, "forward", False)],
    ids=["its-time-is-up", "before-the-first-step", "cancelled"],
)
def test_slurm_is_asked_to_start_a_job_again_whose_time_is_up(
    number: signal.Signals, moment: str, requeued: bool, tmp_path: Path
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    slurm = {
        **{"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
        **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"},
        "PATH": f"{scontrol.parent}:/usr/bin:/bin",
    }
    line = words(tmp_path, "name=job", "trainer.max_steps=4", "eval.every_n_steps=4", "optimizer=adamw")
    job = Job(tmp_path / "log", *line, events=[Event(0, moment, 2 if moment == "forward" else 1, number)], **slurm)
    assert job.wait() == 75, job.log.read_text()
    assert (tmp_path / "asked").exists() == requeued
    if requeued:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
    steps = list(checkpoint_steps(tmp_path / "runs" / "job" / "checkpoints"))
    assert steps == ([2] if moment == "forward" else [])
    assert not list((tmp_path / "runs" / "job").glob("hpc_ckpt*"))  # Lightning's own, which nobody would read


@pytest.mark.parametrize(
    ("logger", "file"),
    [
        ("+logger.also._target_=lightning.pytorch.loggers.CSVLogger", "lightning_logs/version_0/metrics.csv"),
        pytest.param("logger=wandb", "wandb/latest-run", marks=pytest.mark.slow),
    ],
    ids=["csv", "wandb"],
)
def test_two_ranks_leave_the_files_of_one(logger: str, file: str, tmp_path: Path) -> None:
    """One run directory, written by the first rank alone, the logger's folder included."""
    common = (logger, "trainer.max_steps=2", "optimizer=adamw", "eval.sample_tokens=4")
    both = ("strategy=ddp", "trainer.devices=2", "data.batch_size=1")
    files = []
    for name, more in (("one", ("data.batch_size=2",)), ("two", both)):
        job = Job(tmp_path / f"log-{name}", *words(tmp_path, f"name={name}", *common, *more), WANDB_SILENT="true")
        assert job.wait() == 0, job.log.read_text()
        assert job.log.read_text().count("run directory") == 1
        run = tmp_path / "runs" / name
        files.append(sorted(_named(path, run) for path in run.rglob("*")))
    assert files[0] == files[1] and file in files[0]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]


def _named(path: Path, run: Path) -> str:
    """Without what differs between two runs of W&B: times and identifiers."""
    return re.sub(r"run-[^/.]*", "run", str(path.relative_to(run)))
