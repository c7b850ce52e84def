"""`train.py -m`: what a sweep records, repeats, refuses and survives. Trials are stand-ins but for the slow test."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightsparse.cli import train as command
from lightsparse.config.targets import ConfigError
from lightsparse.sweep import launcher
from lightsparse.sweep import trials as work
from lightsparse.sweep.record import SweepRecord, TrialRecord, load_record
from lightsparse.sweep.trial import run_trial, trial_command, trial_environment
from lightsparse.training.checkpoints.lock import holder, lock, unlock
from lightsparse.training.preemption import Preemption

ROOT = Path(__file__).parents[2]
SWEEP = ("-m", "experiment=smoke", "hydra.launcher.name=s", "seed=1,2,3")


class StandIns:
    """Programs in place of trials: what each does by its seed, and which were started."""

    def __init__(self):
        self.started = []
        self.plans = {}
        self.instead = {}  # seed → shell command of one that does not finish

    def command(self, overrides):
        plan = self.plans[tuple(overrides)]
        config = plan.config
        self.started.append(config.seed)
        if config.seed in self.instead:
            return ["sh", "-c", self.instead[config.seed]]
        folder = plan.directory.path
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(config.composed), folder / "config.yaml")
        found = {"finished": True, "steps": config.trainer.max_steps, "val_bits_per_byte": 0.25 * config.seed}
        (folder / "summary.json").write_text(json.dumps(found))
        return ["true"]

    def planned(self, overrides, plan):
        return self.plans.setdefault(tuple(overrides), plan)


@pytest.fixture
def trials(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = StandIns()
    monkeypatch.setattr(work, "trial_command", found.command)
    plan = work.Trials._plan
    monkeypatch.setattr(work.Trials, "_plan", lambda self, words, raw: found.planned(words, plan(self, words, raw)))
    yield found
    unlock(tmp_path / "runs/s")


def sweep(monkeypatch, *words):
    """Run the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr(launcher, "_begun", [])
    try:
        command.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def statuses():
    return [trial.status for trial in load_record(Path("runs/s")).trials]


def test_every_trial_runs_once_and_a_second_start_repeats_none(trials, monkeypatch, capsys):
    assert sweep(monkeypatch, *SWEEP) == 0 and trials.started == [1, 2, 3]
    record = load_record(Path("runs/s"))
    assert [(trial.status, trial.sweep_metric, trial.starts) for trial in record.trials] == [
        ("finished", 0.25 * seed, 1) for seed in (1, 2, 3)
    ]
    assert [trial.varied for trial in record.trials] == [["seed=1"], ["seed=2"], ["seed=3"]]
    assert "trial 2  seed=2  0.5000 bits per byte" in capsys.readouterr().out
    assert sweep(monkeypatch, *SWEEP) == 0 and trials.started == [1, 2, 3]
    assert "finished before" in capsys.readouterr().out


def test_a_trial_counts_by_what_it_minimises(trials, monkeypatch, capsys):
    sweep(monkeypatch, *SWEEP)
    record = load_record(Path("runs/s"))
    wrong = {"finished": True, "steps": 20, "val_bits_per_byte": 9.0, "val_accuracy": 0.75}
    summary = Path(record.trials[1].run) / "summary.json"
    summary.write_text(json.dumps(wrong | {"minimised": "1 - val_accuracy"}))
    sweep(monkeypatch, *SWEEP)
    assert load_record(Path("runs/s")).trials[1].sweep_metric == 0.25
    assert "0.2500 = 1 - val_accuracy, finished before" in capsys.readouterr().out


def test_a_trial_that_crashes_or_is_killed_is_named_and_the_others_run(trials, monkeypatch, capsys):
    trials.instead = {1: "echo the disk is full >&2; exit 3", 2: "kill -9 $$"}
    assert sweep(monkeypatch, *SWEEP) == 1 and trials.started == [1, 2, 3]
    first, second, _ = load_record(Path("runs/s")).trials
    assert (first.status, first.exit_code, first.error) == ("failed", 3, "code 3: the disk is full")
    assert (second.status, second.exit_code) == ("failed", -9) and second.error.startswith("signal 9")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("2 of 3 trials failed") and "seed=1; seed=2" in said


def test_a_trial_that_ends_badly_after_its_summary_is_failed(trials, monkeypatch):
    finish = trials.command
    monkeypatch.setattr(work, "trial_command", lambda overrides: (finish(overrides), ["sh", "-c", "exit 4"])[1])
    assert sweep(monkeypatch, *SWEEP) == 1
    assert [(trial.status, trial.exit_code) for trial in load_record(Path("runs/s")).trials] == [("failed", 4)] * 3


def test_a_trial_is_found_by_all_of_its_overrides():
    trials = [TrialRecord(words, words, "runs/x", 1, "running") for words in (["a=1", "b=2"], ["a=1"])]
    assert SweepRecord(Path("s"), [], trials).of(["a=1"]) is trials[1]


def test_a_failed_trial_is_tried_again_when_asked_only(trials, monkeypatch):
    trials.instead = {2: "exit 1"}
    sweep(monkeypatch, *SWEEP)
    trials.instead = {}
    assert sweep(monkeypatch, *SWEEP) == 1 and trials.started == [1, 2, 3]
    assert sweep(monkeypatch, *SWEEP, "hydra.launcher.retry=true") == 0 and trials.started == [1, 2, 3, 2]
    assert statuses() == ["finished"] * 3 and load_record(Path("runs/s")).trials[1].starts == 2


def test_a_trial_that_ended_with_75_goes_on_at_the_next_start(trials, monkeypatch, capsys):
    trials.instead = {3: "exit 75"}
    assert sweep(monkeypatch, *SWEEP) == 75 and statuses() == ["finished", "finished", "stopped"]
    assert "which the same command resumes: seed=3" in capsys.readouterr().err
    trials.instead = {}
    assert sweep(monkeypatch, *SWEEP) == 0 and trials.started == [1, 2, 3, 3]


def test_a_trial_under_way_when_the_sweep_was_killed_is_started_again(trials, monkeypatch):
    sweep(monkeypatch, *SWEEP)
    record = load_record(Path("runs/s"))
    record.trials[1].status = "running"
    record.save()
    (Path(record.trials[1].run) / "summary.json").unlink()
    assert sweep(monkeypatch, *SWEEP) == 0 and trials.started == [1, 2, 3, 2]


@pytest.mark.parametrize("answer", ["trap 'exit 75' TERM;", ""], ids=["saves", "still imports"])
def test_sigterm_reaches_the_trial_and_ends_the_sweep_with_75(trials, monkeypatch, capsys, answer):
    trials.instead = {2: f"{answer} kill -TERM {os.getpid()}; while :; do sleep 0.05; done"}
    assert sweep(monkeypatch, *SWEEP) == 75 and trials.started == [1, 2]
    assert statuses() == ["finished", "stopped"] and "the same command resumes it" in capsys.readouterr().err


def test_a_sweep_whose_job_has_no_time_left_asks_for_another_start(trials, monkeypatch):
    asked = []
    monkeypatch.setattr(work, "requeue", asked.append)
    trials.instead = {2: f"kill -USR1 {os.getpid()}; while :; do sleep 0.05; done"}
    assert sweep(monkeypatch, *SWEEP) == 75 and statuses() == ["finished", "stopped"]
    assert asked == [signal.SIGUSR1]


def test_a_trial_out_of_reach_fails_alone_without_a_start(trials, monkeypatch):
    words = ("-m", "experiment=smoke", "hydra.launcher.name=s", "attention.density=0.0001,1.0")
    assert sweep(monkeypatch, *words) == 1 and trials.started == [0]
    first, second = load_record(Path("runs/s")).trials
    assert (first.status, first.exit_code) == ("failed", 2) and "out of reach" in first.error
    assert second.status == "finished"


@pytest.mark.parametrize("words", [("trainer.max_steps=4,5",), ("seed=1,2", "name=x")])
def test_trials_that_would_share_a_directory_are_refused_before_any_starts(trials, monkeypatch, capsys, words):
    assert sweep(monkeypatch, "-m", "experiment=smoke", *words) == 2 and trials.started == []
    assert "would share runs/" in capsys.readouterr().err


def test_the_key_in_the_name_lets_them_differ(trials, monkeypatch):
    words = ("experiment=smoke", "trainer.max_steps=4,5", "hydra.launcher.name=s")
    assert sweep(monkeypatch, "-m", *words, "name=run-${trainer.max_steps}-${hydra:job.num}") == 0
    assert len(trials.started) == 2 and {path.name for path in Path("runs").iterdir()} == {"run-4-0", "run-5-1", "s"}


def test_a_sweep_has_one_controller(trials, monkeypatch, capsys):
    folder = Path("runs/s")
    folder.mkdir(parents=True)
    owner = [sys.executable, "-c", "import fcntl,sys,time;f=open('runs/s/.lock','w');fcntl.flock(f,2);print(flush=1);"]
    owner[-1] += "time.sleep(60)"
    with subprocess.Popen(owner, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert sweep(monkeypatch, *SWEEP) == 2 and trials.started == []
        other.kill()
    assert "is a sweep that" in capsys.readouterr().err


def test_under_torchrun_a_sweep_is_refused(trials, monkeypatch, capsys):
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert sweep(monkeypatch, *SWEEP) == 2 and "start it without" in capsys.readouterr().err


def test_a_single_task_of_slurm_runs_a_sweep_whose_trials_have_no_rank_in_the_job(trials, monkeypatch):
    task = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sweep", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    assert sweep(monkeypatch, *SWEEP) == 0 and trials.started == [1, 2, 3]
    assert "SLURM_PROCID" in os.environ and "SLURM_PROCID" not in trial_environment("s", {})


def test_a_sampler_without_seed_is_refused_as_a_killed_sweep_could_not_go_on():
    config = OmegaConf.create(
        {"hydra": {"sweeper": {"sampler": {"seed": None}, "storage": None}, "overrides": {"task": [], "hydra": []}}}
    )
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.sampler\.seed is null"):
        launcher.TrialLauncher(None, False).setup(hydra_context=None, task_function=None, config=config)


def test_the_name_follows_what_is_swept_and_not_where_it_goes():
    one = launcher._digest(["seed=1,2", "runs_dir=a"], [])
    assert one == launcher._digest(["runs_dir=b", "seed=1,2"], ["hydra.launcher.retry=true"])
    assert one != launcher._digest(["seed=1,3"], []) != launcher._digest(["seed=1,3"], ["hydra/sweeper=optuna"])


def test_a_trial_is_the_command_itself_and_its_exit_code_the_commands(tmp_path):
    assert trial_command(["seed=1"])[1:] == ["-m", "lightsparse", "train", "seed=1"]
    for code in (0, 2, 75):
        assert run_trial(["sh", "-c", f"exit {code}"], dict(os.environ), tmp_path / "log.txt", Preemption()) == code


def test_w_and_b_groups_the_runs_by_the_sweep_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    assert trial_environment("s", {})["WANDB_RUN_GROUP"] == "s"
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert trial_environment("s", {})["WANDB_RUN_GROUP"] == "mine"


def test_who_holds_a_folder_is_told_to_others_only(tmp_path):
    assert holder(tmp_path) is None
    lock(tmp_path)
    assert holder(tmp_path) is None  # ours
    asks = "from lightsparse.training.checkpoints.lock import holder, Path; print(holder(Path('.')))"
    told = subprocess.run([sys.executable, "-c", asks], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.startswith(f"process {os.getpid()} on ")
    unlock(tmp_path)


TRIAL = """
import json, os, sys
from pathlib import Path
from omegaconf import OmegaConf
from lightsparse.cli import train
from lightsparse.cli.work import train as work

def fit(config):
    folder = Path(config.runs_dir, config.name)
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(dict(config.composed)), folder / "config.yaml")
    summary = {"finished": True, "steps": config.trainer.max_steps, "val_bits_per_byte": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary

work.fit = fit
train.main()
"""


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Trials are the command itself, as programs of their own, but for the training."""
    monkeypatch.chdir(tmp_path)
    started = []

    def command(overrides):
        started.append(overrides)
        return [sys.executable, "-c", TRIAL, *overrides]

    monkeypatch.setattr(work, "trial_command", command)
    return started


@pytest.mark.multiprocess
def test_a_trial_runs_the_config_that_was_composed_for_it_and_resumes_it(programs, monkeypatch, tmp_path):
    """Composed once more, its words would mean another one: a config, a folder and a moment are not among them."""
    for folder in ("one", "two/mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "one/own.yaml").write_text("defaults: [config, mine: here, _self_]\n")
    (tmp_path / "two/mine/here.yaml").write_text("# @package trainer\nmax_steps: 7\n")
    where = ("--config-dir=one", "--config-name=own", f"hydra.searchpath=[file://{tmp_path}/two]", "seed=3")
    where += ("name=at-${now:%S-%f}",)
    assert sweep(monkeypatch, "-m", *where) == 0
    (folder,) = Path("runs").glob("sweep-*")
    (trial,) = load_record(folder).trials
    assert OmegaConf.load(f"{trial.run}/config.yaml").trainer.max_steps == 7
    assert Path(trial.run).name.startswith("at-") and (trial.status, trial.exit_code) == ("finished", 0)
    assert sweep(monkeypatch, "-m", *where) == 0 and len(programs) == 1
    unlock(folder)


@pytest.mark.parametrize(("direction", "best"), [("minimize", 2), ("maximize", 3)])
def test_a_failed_trial_is_never_the_best_of_an_optimiser(trials, monkeypatch, capsys, direction, best):
    pytest.importorskip("optuna")
    trials.instead = {1: "exit 1"}
    optuna = (
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1",
    )
    sweep(monkeypatch, *SWEEP, *optuna, f"hydra.sweeper.direction={direction}")
    assert sorted(trials.started) == [1, 2, 3]
    found = OmegaConf.load("runs/s/optimization_results.yaml")
    assert found.best_value == 0.25 * best and int(found.best_params.seed) == best


def test_what_was_not_chosen_by_the_sweep_is_not_listed_whatever_its_spelling(trials, monkeypatch):
    words = ("trainer.progress=false", "eval.tasks.lengths=[64, 128]", "optimizer.lr=1e-3", "seed=1,2")
    assert sweep(monkeypatch, "-m", "experiment=smoke", "hydra.launcher.name=s", *words) == 0
    varied = [trial.varied for trial in load_record(Path("runs/s")).trials]
    assert varied == [["seed=1"], ["seed=2"]]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_sweep_of_trials_with_two_ranks_killed_in_the_middle_goes_on(tmp_path):
    tiny = ("model.depth=1", "data.context=256", "eval.tokens=2048", "eval.sample_tokens=0", "trainer.max_steps=6")
    ranks = ("strategy=ddp", "trainer.devices=2", "schedule.warmup_steps=1", "threads=1")
    words = [sys.executable, str(ROOT / "train.py"), "-m", "experiment=smoke", "seed=1,2", *tiny, *ranks]
    words += ["hydra.launcher.name=s"]
    with subprocess.Popen(words, cwd=tmp_path) as controller:
        until = time.monotonic() + 300
        while not (tmp_path / "runs/s/sweep.json").exists() and time.monotonic() < until:
            time.sleep(0.2)
        controller.send_signal(signal.SIGKILL)
    done = subprocess.run(words, cwd=tmp_path, timeout=600, check=False)
    record = load_record(tmp_path / "runs/s")
    assert done.returncode == 0 and record is not None
    assert [(trial.status, trial.ranks) for trial in record.trials] == [("finished", 2)] * 2
