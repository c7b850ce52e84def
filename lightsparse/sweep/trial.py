"""One trial as a program of its own: its command line, its life, and how it ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightsparse.config.compose import handing
from lightsparse.training.preemption import Preemption

_POLL = 0.2  # seconds between looks


def trial_command(overrides: Sequence[str]) -> list[str]:
    """What to execute; a trial of several ranks starts them by itself, and its exit code is theirs.

    The words are for who looks at processes: it runs the config that its environment hands it.
    """
    return [sys.executable, "-m", "lightsparse", "train", *overrides]


def trial_environment(sweep: str, composed: Mapping[str, Any]) -> dict[str, str]:
    """This process's variables and the trial's config; lightsparse can be imported, and W&B groups the runs of a sweep
    by its name. Composed once more, the words could mean another config: with ${now:}, with --config-name, with conf/
    edited since. Raises ConfigError where the config is too long to be handed on.
    """
    environment = {"WANDB_RUN_GROUP": sweep, **os.environ, **handing(composed)}
    environment.pop("SLURM_PROCID", None)  # the sweep is the job's task: a trial must not have the job started again
    # `python train.py` finds the package beside the script; `python -m` looks in the working directory instead.
    paths = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def run_trial(command: Sequence[str], environment: dict[str, str], log: Path, preemption: Preemption) -> int:
    """Execute the command with its output appended to `log`; returns its exit code, negative for a signal.

    When this process is asked to stop, the trial is, once, and finishes its step. It lives in a session of its own:
    a Ctrl-C would otherwise reach it twice, and the second one means that it shall not save.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            while process.poll() is None and not preemption.asked:
                time.sleep(_POLL)
            process.terminate()  # no signal where it has ended
            return process.wait()
        finally:
            if process.poll() is None:  # KeyboardInterrupt: a second Ctrl-C
                process.kill()
                process.wait()


def last_words(log: Path) -> str:
    """The last line that a trial wrote."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it wrote nothing")
