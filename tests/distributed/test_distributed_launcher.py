"""Ranks 1, 2, … are started by the command that started this process, whatever it was, each told which it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from rank_forks import Job
from rank_runs import environment, words

from lightsparse.distributed import launcher
from lightsparse.distributed.launcher import RankLauncher
from lightsparse.training.checkpoints.files import newest_checkpoint
from lightsparse.training.metrics.metrics_file import read_metrics

TOLD = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


class Started:
    """A child that ends well, and notes what it was started with and sent."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.command, self.env, self.sent = command, env, list[int]()

    def poll(self) -> int:
        return 0

    def send_signal(self, number: int) -> None:
        self.sent.append(number)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """Those that are started, in an environment without any launcher's variables."""
    found: list[Started] = []
    kept = {name: value for name, value in os.environ.items() if name not in (*TOLD, "GROUP_RANK", "OMP_NUM_THREADS")}
    monkeypatch.setattr(os, "environ", kept)
    monkeypatch.setattr(launcher, "Popen", lambda command, env: found.append(Started(command, env)) or found[-1])
    monkeypatch.setattr(launcher, "usable_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return found


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "lightsparse", "train", "seed=1"],
        ["/venv/bin/lightsparse", "train", "seed=1"],
        ["-X", "utf8", "train.py", "seed=1"],
        ["-c", "from lightsparse.cli.train import main; main()", "seed=1"],
    ],
    ids=lambda command: command[0],
)
def test_each_child_repeats_the_command_of_this_process(
    command: list[str], children: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python3", *command])
    monkeypatch.setattr(sys, "argv", ["what lightsparse leaves of it"])
    assert RankLauncher(LightningEnvironment(), 3, 2, {}).launch(lambda x: x + 1, 4) == 5
    assert [child.command for child in children] == [[sys.executable, *command]] * 2


def test_each_child_is_told_which_rank_it_is(children: list[Started]) -> None:
    ranks = LightningEnvironment()
    RankLauncher(ranks, 3, 2, {"HANDED": "this"}).launch(lambda: os.environ.update(PL_GLOBAL_SEED="7"))
    own = {name: os.environ[name] for name in TOLD}
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.main_port), "NODE_RANK": "0", "WORLD_SIZE": "6"}
    assert own == common | {"LOCAL_RANK": "0"}
    for local_rank, child in enumerate(children, start=1):
        assert {name: child.env[name] for name in TOLD} == common | {"LOCAL_RANK": str(local_rank)}
        assert child.env["HANDED"] == "this" and "HANDED" not in os.environ
        assert child.env["OMP_NUM_THREADS"] == "2"  # of six cores
        assert child.env["LIGHTSPARSE_LAUNCHER"] == str(os.getpid())


def test_threads_that_the_user_has_set_stay(children: list[Started]) -> None:
    os.environ["OMP_NUM_THREADS"] = "5"
    RankLauncher(LightningEnvironment(), 2, 1, {}).launch(lambda: None)
    assert children[0].env["OMP_NUM_THREADS"] == "5"


def test_ranks_that_torchrun_has_started_start_none(children: list[Started], monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ.update(LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="1")
    assert RankLauncher(TorchElasticEnvironment(), 2, 1, {}).launch(lambda: 3) == 3
    assert not children


def test_a_signal_is_handed_on(children: list[Started]) -> None:
    started = RankLauncher(LightningEnvironment(), 3, 1, {})
    started.launch(lambda: started.kill(signal.SIGTERM))
    assert [child.sent for child in children] == [[signal.SIGTERM]] * 2


@pytest.mark.multiprocess
def test_the_verb_train_starts_its_second_rank(tmp_path: Path) -> None:
    line = words(tmp_path, "name=two", "strategy=ddp", "trainer.devices=2", "data.batch_size=1", "trainer.max_steps=2")
    command: list[Any] = [sys.executable, "-m", "lightsparse", "train", *line]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "runs/two/metrics.csv")] == [0, 1, 2]
    assert done.stdout.count("run directory") == 1 and "ranks    2 = 2 data" in done.stdout


@pytest.mark.multiprocess
def test_a_path_of_the_moment_is_the_first_rank_s_on_all_of_them(tmp_path: Path) -> None:
    """Each would compose another one, and write its shards there."""
    more = ("name=at-${now:%S-%f}", "strategy=fsdp", "trainer.devices=2", "data.batch_size=1", "trainer.max_steps=2")
    job = Job(tmp_path / "log", *words(tmp_path, *more, "optimizer=adamw"))
    assert job.wait() == 0, job.log.read_text()
    (run,) = (tmp_path / "runs").iterdir()
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None and newest[0] == 2


@pytest.mark.multiprocess
def test_ranks_that_compose_different_names_are_refused_and_leave_no_directory(tmp_path: Path) -> None:
    line = words(tmp_path, "name=at-${now:%S-%f}", "strategy=ddp", "data.batch_size=1", "trainer.max_steps=2")
    job = Job(tmp_path / "log", *line, torchrun=("--nproc-per-node=2",))
    assert job.wait() == 1 and job.codes == {0: 2, 1: 2}
    assert "rank 1 has name=at-" in job.log.read_text() and "${now:" in job.log.read_text()
    assert not (tmp_path / "runs").exists()
