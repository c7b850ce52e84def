"""Which rank a process is, only its launcher says; a variable that a shell has left over changes nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from rank_forks import Job
from rank_runs import command, environment, words

from lightsparse.distributed.environment import (
    _RANKS,
    check_machines,
    cluster_environment,
    ignore_stray_ranks,
    is_first_rank,
    launched_ranks,
    launcher,
)
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.utils.refusal import Refusal

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
OURS = {"LIGHTSPARSE_LAUNCHER": "7", "LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2"}
BY_HAND = {"NODE_RANK": "0", "MASTER_ADDR": "one", "MASTER_PORT": "29500"}
SLURM = {"SLURM_JOB_ID": "9", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
SCRIPT = SLURM | {"SLURM_TASK_PID": "12"}  # a job's script, outside of srun
FIRST = [
    ({}, None),
    (TORCHRUN, "torchrun"),
    (TORCHRUN | SLURM | {"NODE_RANK": "1"}, "torchrun"),
    (OURS, "ours"),
    ({"LIGHTSPARSE_LAUNCHER": "7", "LOCAL_RANK": "0", "NODE_RANK": "0"}, "ours"),  # Lightning removes WORLD_SIZE
    (BY_HAND, "by hand"),
    (SLURM, "SLURM"),
    (SCRIPT | {"SLURM_STEP_ID": "0"}, "SLURM"),
]
OTHERS = [
    (TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"}, "torchrun"),
    (TORCHRUN | {"RANK": "2", "GROUP_RANK": "1"}, "torchrun"),
    (OURS | {"LOCAL_RANK": "1"}, "ours"),
    (BY_HAND | {"NODE_RANK": "1"}, "by hand"),
    (SLURM | {"SLURM_PROCID": "3"}, "SLURM"),
]
STRAY = [
    *({name: value} for name in _RANKS for value in ("1", "")),
    {"LOCAL_RANK": "0"},
    {"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
    {"RANK": "1", "WORLD_SIZE": "2"},
    {"MASTER_ADDR": "gone", "MASTER_PORT": ""},
    {"NODE_RANK": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"},
]
NOT_RANKS = [
    SLURM | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
    SLURM | {"SLURM_JOB_NAME": "bash"},
    SLURM | {"SLURM_JOB_NAME": "interactive"},
    SCRIPT,
]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """use(variables) → an environment with them and nothing else of a launcher."""

    def only(variables: Mapping[str, str]) -> None:
        kept = {name: value for name, value in environment().items() if not name.startswith("SLURM_")}
        monkeypatch.setattr(os, "environ", kept | variables)

    return only


@pytest.mark.parametrize(("variables", "by"), FIRST + OTHERS, ids=str)
def test_exactly_one_process_of_every_launcher_is_the_first(use, variables: dict[str, str], by: str | None) -> None:
    use(variables)
    assert launcher() == by and is_first_rank() == ((variables, by) in FIRST)
    assert list(ignore_stray_ranks()) == [] and variables.items() <= os.environ.items()


@pytest.mark.parametrize("variables", STRAY, ids=str)
def test_a_rank_without_a_launcher_is_ignored_by_name(use, variables: dict[str, str]) -> None:
    use(variables)
    assert launcher() is None and is_first_rank() and launched_ranks() is None
    said = list(ignore_stray_ranks())
    ranks = [name for name in (*_RANKS, "MASTER_ADDR", "MASTER_PORT") if name in variables]
    assert [line.partition(" ")[0] for line in said] == [f"{name}={variables[name]}" for name in ranks]
    assert not set(ranks) & os.environ.keys()
    assert not cluster_environment().creates_processes_externally


@pytest.mark.parametrize("variables", NOT_RANKS, ids=str)
def test_a_task_shell_or_script_of_slurm_is_no_rank_of_several(use, variables: dict[str, str]) -> None:
    use(variables)
    assert launcher() is None and launched_ranks() is None and list(ignore_stray_ranks()) == []


def test_slurm_need_not_say_how_many_tasks_a_machine_has(use) -> None:
    use(SLURM | {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    ranks = cluster_environment()
    ranks.validate_settings(num_devices=2, num_nodes=2)
    assert ranks.world_size() == 4 and ranks.creates_processes_externally
    use(SLURM | {"SLURM_NTASKS": "3"})
    with pytest.raises(Refusal, match="SLURM has started 3 tasks on 2 machines"):
        launched_ranks()


def test_machines_that_could_not_find_each_other_are_refused(use) -> None:
    use({})
    check_machines(1)
    with pytest.raises(Refusal, match=r"trainer\.num_nodes is 2, and nothing tells"):
        check_machines(2)
    use(BY_HAND | {"NODE_RANK": "1"})
    check_machines(2)
    with pytest.raises(Refusal, match=r"NODE_RANK is 1 and trainer\.num_nodes is 1"):
        check_machines(1)


@pytest.mark.multiprocess
def test_a_run_beside_a_stray_rank_is_an_ordinary_run_with_one_writer(tmp_path: Path) -> None:
    line = words(tmp_path, "name=run", "trainer.max_steps=2", "eval.every_n_steps=2", "optimizer=adamw")
    stray = environment(RANK="", SLURM_PROCID="1")
    done = subprocess.run(command(line), env=stray, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "SLURM_PROCID=1 is ignored" in done.stderr, done.stderr
    run = tmp_path / "runs" / "run"
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [0, 1, 2]
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.name != ".lock" and path.is_file()}
    job = Job(tmp_path / "log", *line, "optimizer.lr=0.5", "trainer.max_steps=4", LOCAL_RANK="1", SLURM_PROCID="1")
    assert job.wait() == 2 and "optimizer.lr" in job.log.read_text()
    assert {path: path.read_bytes() for path in before} == before
