"""The trials of a sweep, one after the other, and what becomes of each."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lightsparse.config.parse import on_this_machine, parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.sweep.record import SweepRecord, TrialRecord
from lightsparse.sweep.trial import last_words, run_trial, trial_command, trial_environment
from lightsparse.training.checkpoints.lock import holder, lock
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.endings import in_one_sentence
from lightsparse.training.metrics.summary import sweep_metric
from lightsparse.training.preemption import Preemption, leave_when_asked, requeue
from lightsparse.training.preflight.check import check
from lightsparse.utils.compat.hydra import varied_words
from lightsparse.utils.rank_errors import EXIT_CODE
from lightsparse.utils.text import duration


@dataclass(frozen=True)
class _Plan:
    """A trial before it starts."""

    overrides: list[str]
    config: Config

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory.of(self.config)


class Trials:
    """Of one sweep.

    retry   whether failed ones are tried again
    failed  what a failed one gives to the sweeper
    """

    def __init__(self, sweep: SweepRecord, retry: bool, failed: float = math.inf) -> None:
        self.sweep, self.retry, self.failed = sweep, retry, failed
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self._plans: dict[Path, _Plan] = {}  # run directory → its trial
        leave_when_asked()

    def run(self, asked: Sequence[list[str]], composed: Sequence[Mapping[str, Any]], first: int) -> list[float]:
        """What each trial minimises, and `failed` for one that has failed.

        asked     the overrides of each
        composed  the config of each, as Hydra composed it
        first     the number of the first one in what is printed
        """
        with in_one_sentence():
            plans = list(map(self._plan, asked, composed))  # all, before the first one starts
            self._open()
            preemption = Preemption()
            preemption.listen()
            try:
                trials = [self._trial(plan, preemption, f"trial {number}") for number, plan in enumerate(plans, first)]
            finally:
                preemption.stop_listening()
        return [self.failed if trial.sweep_metric is None else trial.sweep_metric for trial in trials]

    def _plan(self, overrides: list[str], composed: Mapping[str, Any]) -> _Plan:
        """Parse; raises ConfigError for a wrong config, and for two trials that share a run directory."""
        config = parse(on_this_machine(composed))
        if config.doctor:
            raise ConfigError("doctor is true, which examines one run; leave out -m and the values beside the first")
        if config.trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes is {config.trainer.num_nodes}, and trials of this launcher stay on this machine; "
                "use hydra/launcher=submitit_slurm"
            )
        plan, known = _Plan(overrides, config), self.sweep.of(overrides)
        if known is not None and config.composed["name"] is not None and not plan.directory.path.exists():
            path = Path(known.run)  # where an earlier start of the sweep has put it, by a name with ${now:}
            if path.exists():
                plan = _Plan(overrides, parse({**config.composed, "name": path.name, "runs_dir": str(path.parent)}))
        other = self._plans.setdefault(plan.directory.path, plan)
        if other.config.composed != plan.config.composed:
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
            varied = varied_words(plan.overrides, self.sweep.command)
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
        word = f"{trial.status}: {trial.error}" if trial.sweep_metric is None else trial.result
        self.console.print(f"{label}  {trial.title}  {word}  ({duration(trial.seconds)})")
        self._leave_if(preemption)
        return trial

    def _start(self, trial: TrialRecord, plan: _Plan, preemption: Preemption) -> None:
        log = self.sweep.directory / "logs" / f"{plan.directory.path.name}.txt"
        trial.status, trial.log, trial.starts = "running", str(log.relative_to(self.sweep.directory)), trial.starts + 1
        trial.run = str(plan.directory.path)
        trial.error, trial.exit_code = None, None
        self.sweep.save()
        started = time.perf_counter()
        environment = trial_environment(self.sweep.directory.name, plan.config.composed)
        trial.exit_code = run_trial(trial_command(plan.overrides), environment, log, preemption)
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
            summary = plan.directory.look(replace(plan.config, resume="auto")).summary
        except ConfigError:  # a directory that the trial refuses, with its sentence
            return False
        if summary is None:
            return False
        trial.status, trial.sweep_metric, trial.error = "finished", sweep_metric(summary), None
        trial.minimised = summary.get("minimised", "val_bits_per_byte")
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
            sys.stderr.write(f"{self.sweep.directory} is stopped; the same command resumes it\n")
            requeue(preemption.asked)
            sys.exit(EXIT_CODE)
