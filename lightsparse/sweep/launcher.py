"""Hydra's launcher for `-m`: one trial after the other, each as a program of its own, what became of it in sweep.json.

A trial that crashes, is killed for memory or loses a rank is recorded, and the sweep goes on. Hydra's own launcher
runs trials inside this process, where the first of these ends them all, and where ranks that Lightning starts would
run the whole sweep again.

This is Hydra's side of it: Hydra imports the launcher at every start, of runs without `-m` too, and all trials are
composed before trials.py, which needs torch, is imported.

Hidden state: Hydra's list of plugins and `sys.path` (`register_launcher`), and `_begun`, the sweeps of this process,
for `ending`: Hydra hands on nothing of what its launcher did.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightsparse.config.compose import plain
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.environment import launched_ranks
from lightsparse.sweep.record import SweepRecord, load_record
from lightsparse.utils.compat.hydra import add_launcher, config_of_trial, result_of_trial

if TYPE_CHECKING:
    from lightsparse.sweep.trials import Trials

log = logging.getLogger(__name__)


class TrialLauncher(Launcher):
    """conf/hydra/launcher/trials.yaml has its arguments. `launch` returns what each trial minimises, and
    infinity for one that failed, below zero for a sweeper that maximises: a failed trial is never the best one."""

    __module__ = "hydra_plugins.lightsparse_trials"  # the name by which Hydra builds it

    def __init__(self, name: str | None, retry: bool) -> None:
        self.name, self.retry = name, retry

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by the sweeper before it chooses trials. Raises ConfigError for a sweep that cannot run or resume."""
        self.hydra_context, self.config = hydra_context, config
        if launched_ranks() is not None:
            raise ConfigError(
                "-m was started by torchrun or SLURM, where every rank would run the sweep; start it without: "
                "trials with trainer.devices above 1 get a torchrun each"
            )
        sampler = OmegaConf.select(config, "hydra.sweeper.sampler")
        if sampler is not None and "seed" in sampler and sampler.seed is None and config.hydra.sweeper.storage is None:
            raise ConfigError(
                "hydra.sweeper.sampler.seed is null, with which a killed sweep could not resume with the same trials; "
                "set hydra.sweeper.sampler.seed=<a number>"
            )
        written = OmegaConf.to_container(config.hydra, resolve=False)  # a ${now:} would name another sweep each time
        assert isinstance(written, dict)
        command, params = written["overrides"]["task"], written["sweeper"].get("params") or {}
        said = [*command, *(f"{key}={value}" for key, value in params.items())]
        digest = _digest(said, written["overrides"]["hydra"])
        directory = Path(os.path.expanduser(config.runs_dir)) / (self.name or f"sweep-{digest}")
        direction = OmegaConf.select(config, "hydra.sweeper.direction")
        self.failed = -math.inf if getattr(direction, "name", direction) == "maximize" else math.inf
        if self.failed < 0:
            log.warning(
                "hydra.sweeper.direction is maximize, and what a trial returns (bits per byte, or the share of wrong "
                "answers) is the better the lower it is: the sweeper will look for the worst trial"
            )
        self.sweep = load_record(directory) or SweepRecord(directory, command)
        self._trials: Trials | None = None
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(directory)  # for the multirun.yaml that sweepers write
        _begun.append(self.sweep)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        asked = [list(overrides) for overrides in job_overrides]
        raws = [self._composed(overrides, number) for number, overrides in enumerate(asked, initial_job_idx)]
        if self._trials is None:
            from lightsparse.sweep.trials import Trials

            self._trials = Trials(self.sweep, self.retry, self.failed)
        values = self._trials.run(asked, raws, initial_job_idx + 1)
        return [result_of_trial(overrides, value) for overrides, value in zip(asked, values, strict=True)]

    def _composed(self, overrides: list[str], number: int) -> dict[str, Any]:
        with config_of_trial(self.hydra_context, self.config, overrides, number) as found:
            composed = copy.deepcopy(found)
            with read_write(composed), open_dict(composed):
                del composed["hydra"]
            return plain(composed)


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
    add_launcher(TrialLauncher)  # Hydra may have looked around before


def ending() -> tuple[int, str]:
    """The exit code of the sweep that has just ended, and its sentence; (0, "") where all went well or none was run."""
    for sweep in _begun:
        failed, stopped = sweep.with_status("failed"), sweep.with_status("stopped")
        if failed:
            names = "; ".join(trial.title for trial in failed)
            return 1, f"{len(failed)} of {len(sweep.trials)} trials failed, {sweep.path} says why: {names}"
        if stopped:
            from lightsparse.utils.rank_errors import EXIT_CODE

            names = "; ".join(trial.title for trial in stopped)
            return EXIT_CODE, f"{sweep.directory} has stopped trials, which the same command resumes: {names}"
    return 0, ""


def _digest(command: Sequence[str], hydra: Sequence[str]) -> str:
    """Of all that says which trials there are; where the results go does not."""
    said = sorted(word for word in command if not word.startswith("runs_dir="))
    chosen = sorted(str(word) for word in hydra if str(word).startswith(("hydra/sweeper", "hydra.sweeper")))
    return hashlib.sha256(json.dumps([said, chosen]).encode()).hexdigest()[:8]
