"""Hydra's launcher for `-m`: one trial after the other, each as a program of its own, what became of it in sweep.json.

A trial that crashes, is killed for memory or loses a rank is recorded, and the sweep goes on. Hydra's own launcher
runs trials inside this process, where the first of these ends them all, and where the ranks of a trial would run
the whole sweep again.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console

from lightsparse.config.compose import plain
from lightsparse.config.parse import on_this_machine, parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.environment import launched_ranks
from lightsparse.sweep.record import SweepRecord, TrialRecord, load_record
from lightsparse.sweep.trial import last_words, run_trial, trial_command, trial_environment
from lightsparse.training.checkpoints.lock import holder, lock
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.metrics.summary import objective
from lightsparse.training.preemption import Preemption
from lightsparse.training.preflight.check import check
from lightsparse.utils.compat.hydra import add_launcher, config_of_trial, result_of_trial
from lightsparse.utils.rank_errors import EXIT_CODE
from lightsparse.utils.text import duration


@dataclass(frozen=True)
class _Plan:
    """A trial before it starts."""

    overrides: list[str]
    raw: dict[str, Any]  # the composed config
    config: Config

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(Path(self.config.runs_dir) / self.config.name)


class TrialLauncher(Launcher):
    """conf/hydra/launcher/trials.yaml has its arguments. `launch` returns what each trial minimises, and
    infinity for one that failed: sweepers minimise."""

    __module__ = "hydra_plugins.lightsparse_trials"  # the name by which Hydra builds it

    def __init__(self, name: str | None, retry: bool) -> None:
        self.name, self.retry = name, retry
        self.console = Console(highlight=False, markup=False, soft_wrap=True)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by the sweeper before it chooses trials. Raises ConfigError where the sweep cannot run or go on."""
        self.hydra_context, self.config = hydra_context, config
        if launched_ranks() is not None:
            raise ConfigError(
                "-m was started by torchrun or SLURM, where every rank would run the sweep; start it without: "
                "trials with trainer.devices above 1 get a torchrun each"
            )
        sampler = OmegaConf.select(config, "hydra.sweeper.sampler")
        if sampler is not None and "seed" in sampler and sampler.seed is None and config.hydra.sweeper.storage is None:
            raise ConfigError(
                "hydra.sweeper.sampler.seed is null, with which a killed sweep could not go on with the same trials; "
                "set hydra.sweeper.sampler.seed=<a number>"
            )
        command = [str(word) for word in config.hydra.overrides.task]
        params = [f"{key}={value}" for key, value in (OmegaConf.select(config, "hydra.sweeper.params") or {}).items()]
        digest = _digest([*command, *params], config.hydra.overrides.hydra)
        directory = Path(config.runs_dir) / (self.name or f"sweep-{digest}")
        self.sweep = load_record(directory) or SweepRecord(directory, command)
        self._plans: dict[Path, _Plan] = {}  # run directory → its trial
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(directory)  # for the multirun.yaml that sweepers write
        _begun.append(self.sweep)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        plans = [self._plan(list(overrides)) for overrides in job_overrides]  # all, before the first one starts
        self._open()
        returns = []
        preemption = Preemption()
        preemption.listen()
        try:
            for number, plan in enumerate(plans, start=initial_job_idx + 1):
                trial = self._trial(plan, preemption, f"trial {number}")
                value = math.inf if trial.objective is None else trial.objective
                returns.append(result_of_trial(plan.overrides, value))
        finally:
            preemption.stop_listening()
        return returns

    def _plan(self, overrides: list[str]) -> _Plan:
        """Compose and parse; raises ConfigError for a wrong config, and for two trials that share a run directory."""
        composed = copy.deepcopy(config_of_trial(self.hydra_context, self.config, overrides))
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
        raw = on_this_machine(plain(composed))
        config = parse(raw)
        if config.doctor:
            raise ConfigError("doctor is true, which examines one run; leave out -m and the values beside the first")
        if config.trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes is {config.trainer.num_nodes}, and trials of this launcher stay on this machine; "
                "use hydra/launcher=submitit_slurm"
            )
        plan = _Plan(overrides, raw, config)
        other = self._plans.setdefault(plan.directory.path, plan)
        if other.raw != raw:
            raise ConfigError(
                f"trials {' '.join(other.overrides)} and {' '.join(overrides)} would share {plan.directory.path}, as "
                "they differ only in keys that do not change what is trained, or name is given; put the key into the "
                "name, such as 'name=run-${trainer.max_steps}'"
            )
        return plan

    def _open(self) -> None:
        self.sweep.directory.mkdir(parents=True, exist_ok=True)
        try:
            lock(self.sweep.directory)
        except ConfigError as error:
            raise ConfigError(
                f"{self.sweep.directory} is a sweep that {holder(self.sweep.directory)} runs; wait until it has "
                "ended, or use hydra.launcher.name=<another>"
            ) from error

    def _trial(self, plan: _Plan, preemption: Preemption, label: str) -> TrialRecord:
        """Run the trial unless there is no need to; returns its record."""
        trial = self.sweep.of(plan.overrides)
        if trial is None:
            fixed = set(self.sweep.command)
            varied = [word for word in plan.overrides if word not in fixed]
            trial = TrialRecord(plan.overrides, varied, str(plan.directory.path), plan.config.ranks, "running")
            self.sweep.trials.append(trial)
        self._wait_for_other(plan, preemption, label)
        if self._note_finished(trial, plan):
            self.console.print(f"{label}  {trial.title}  {trial.result}, finished before")
            return trial
        if trial.status == "failed" and not self.retry:
            self.console.print(f"{label}  {trial.title}  failed before; hydra.launcher.retry=true tries it again")
            return trial
        try:
            check(plan.config)
        except ConfigError as error:  # such as a density out of reach: of this trial alone
            trial.status, trial.exit_code, trial.error = "failed", 2, str(error)
            self.sweep.save()
        else:
            self._start(trial, plan, preemption)
        word = f"{trial.status}: {trial.error}" if trial.objective is None else trial.result
        self.console.print(f"{label}  {trial.title}  {word}  ({duration(trial.seconds)})")
        self._leave_if(preemption)
        return trial

    def _start(self, trial: TrialRecord, plan: _Plan, preemption: Preemption) -> None:
        log = self.sweep.directory / "logs" / f"{plan.directory.path.name}.txt"
        trial.status, trial.log, trial.starts = "running", str(log.relative_to(self.sweep.directory)), trial.starts + 1
        trial.error, trial.exit_code = None, None
        self.sweep.save()
        started = time.perf_counter()
        command = trial_command(plan.overrides, plan.config.ranks)
        trial.exit_code = run_trial(command, trial_environment(self.sweep.directory.name), log, preemption)
        trial.seconds = round(trial.seconds + time.perf_counter() - started, 3)
        if trial.exit_code or not self._note_finished(trial, plan):
            # Asked to stop while Python still imported, a trial ends with the signal and not with 75.
            trial.status = "stopped" if trial.exit_code == EXIT_CODE or preemption.asked else "failed"
            how = f"signal {-trial.exit_code}" if trial.exit_code < 0 else f"code {trial.exit_code}"
            trial.error = f"{how}: {last_words(log)}"
        self.sweep.save()

    def _note_finished(self, trial: TrialRecord, plan: _Plan) -> bool:
        """Whether the run directory holds what the trial would give; then the record says so."""
        try:
            found = plan.directory.look("auto", plan.raw, plan.config.trainer.max_steps).summary
        except ConfigError:  # a directory that the trial refuses, with its sentence
            return False
        if found is None:
            return False
        trial.status, trial.objective, trial.error = "finished", objective(found), None
        trial.minimised = found.get("minimised", "val_bits_per_byte")
        self.sweep.save()
        return True

    def _wait_for_other(self, plan: _Plan, preemption: Preemption, label: str) -> None:
        """A sweep killed at once leaves its trial running, which then is the best one to finish it."""
        owner = holder(plan.directory.path)
        if owner is not None:
            self.console.print(f"{label}  {plan.directory.path} is being written by {owner}; waiting for its end")
        while holder(plan.directory.path) is not None:
            time.sleep(0.5)
            self._leave_if(preemption)

    def _leave_if(self, preemption: Preemption) -> None:
        if preemption.asked:
            sys.stderr.write(f"{self.sweep.directory} is stopped; the same command goes on\n")
            sys.exit(EXIT_CODE)


_begun: list[SweepRecord] = []  # sweeps of this process


def register_launcher() -> None:
    """Make hydra/launcher=trials known to Hydra, from a clone as from a wheel.

    Hydra's plugins live in the namespace package hydra_plugins; ours adds its folder to it here, so that nothing has to
    be installed beside the package.
    """
    folder = str(Path(__file__).parent / "plugins")
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    add_launcher(TrialLauncher)


def ending() -> tuple[int, str]:
    """The exit code of the sweep that has just ended, and its sentence; (0, "") where all went well or none was run."""
    for sweep in _begun:
        failed, stopped = sweep.with_status("failed"), sweep.with_status("stopped")
        if failed:
            names = "; ".join(trial.title for trial in failed)
            return 1, f"{len(failed)} of {len(sweep.trials)} trials failed, {sweep.path} says why: {names}"
        if stopped:
            names = "; ".join(trial.title for trial in stopped)
            return EXIT_CODE, f"{sweep.directory} has stopped trials, with which the same command goes on: {names}"
    return 0, ""


def _digest(command: Sequence[str], hydra: Sequence[str]) -> str:
    """Of all that says which trials there are; where the results go does not."""
    said = sorted(word for word in command if not word.startswith("runs_dir="))
    chosen = sorted(str(word) for word in hydra if str(word).startswith(("hydra/sweeper", "hydra.sweeper")))
    return hashlib.sha256(json.dumps([said, chosen]).encode()).hexdigest()[:8]
