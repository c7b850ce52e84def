"""Asked to stop, by a signal or because the time is up: a flag that all ranks read at the same step.

SIGTERM and SIGUSR1 are what schedulers send before they take a machine away, SIGINT is Ctrl-C, SIGHUP the end of a
terminal, unless `nohup` has it ignored. A handler that saved by
itself would stand in the middle of a step, and a signal to one rank only would leave the others waiting in a
collective. So a handler sets a flag, and the ranks agree on it after each optimizer step.

Before the first step and after the last one there is nothing to save. There, the command line ends at once, with the
same code (`leave_when_asked`).

Hidden state: the handlers of the process, its wakeup pipe, and in `_outside` who listens to signals now. A forked
worker has none of it.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer

from lightsparse.distributed.environment import in_slurm_job, is_first_rank, launcher
from lightsparse.distributed.launcher import RankLauncher
from lightsparse.utils.compat.hydra import is_sweep
from lightsparse.utils.rank_errors import EXIT_CODE, leave

log = logging.getLogger(__name__)

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name))
_TIME_IS_UP = 255  # stands for no signal


class Preemption:
    """Whether some rank has been asked to stop.

    max_time  seconds after which this rank asks by itself; None = never
    asked     the number of the signal that came to this rank; 0 = none
    Signals need the main thread; outside it only the time counts. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self.asked = 0
        self._until = None if max_time is None else time.monotonic() + max_time
        self._before: dict[signal.Signals, Any] = {}  # the handlers that were there, while ours are

    def listen(self) -> None:
        """Replace the handlers. To be called after Lightning has put in its own, which end with code 0 or hang."""
        if threading.current_thread() is not threading.main_thread():
            return
        _outside.listeners.add(self)
        for number in _heard():
            before = signal.signal(number, self._ask)
            if before != self._ask:
                self._before[number] = before
        self.asked = self.asked or _outside.asked  # it came while the handlers changed

    def stop_listening(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        _outside.listeners.discard(self)

    def agreed(self, trainer: Trainer) -> int:
        """The largest number that a rank was asked with, _TIME_IS_UP included; 0 = none. Every rank must call this."""
        if not self.asked and self._until is not None and time.monotonic() >= self._until:
            self.asked = _TIME_IS_UP
        agreed = self.asked
        if trainer.world_size > 1:  # a signal that comes while the ranks talk is for the next step
            asked = torch.tensor(float(agreed), device=trainer.strategy.root_device)
            agreed = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if agreed and isinstance(trainer.strategy.launcher, RankLauncher):
            trainer.strategy.launcher.expect_end()
        return agreed

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.asked == signal.SIGINT:
                raise KeyboardInterrupt
            log.info("finishing the step, then saving it; Ctrl-C again leaves at once")
        self.asked = number


def end_run(asked: int, step: int) -> NoReturn:
    """After the checkpoint of `step`: say by what the run is stopped, and end it. Every rank calls this."""
    reason = "trainer.max_time" if asked == _TIME_IS_UP else signal.Signals(asked).name
    log.info("stopped by %s; the same command continues from step %d", reason, step)
    requeue(asked)
    raise SystemExit(EXIT_CODE)


def leave_when_asked() -> None:
    """From now on a signal ends this process at once with code 75, unless a Preemption listens. Main thread only.

    The process may stand in C++ and wait for ranks that never come, where no handler of Python's would run. So the
    number of the signal goes through a pipe to a thread.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in _heard():
        signal.signal(number, _outside.note)
    threading.Thread(target=_outside.leave, args=(reading,), daemon=True, name="signals").start()


def _heard() -> list[signal.Signals]:
    """The signals that ask this process to stop: not SIGHUP where it was started to ignore it."""
    return [number for number in _SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]


class _Outside:
    """What the process does with signals that come when nobody listens."""

    def __init__(self) -> None:
        self.listeners: set[Preemption] = set()
        self.asked = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number

    def leave(self, reading: int) -> None:
        while True:
            (number,) = os.read(reading, 1)  # of any signal that has a handler
            if number in _SIGNALS and not self.listeners:
                requeue(number)
                name = signal.Signals(number).name
                leave(EXIT_CODE, f"stopped by {name} outside of the training steps; the same command resumes the run")

    def forget(self) -> None:
        """In a forked worker: its signals are not its parent's, which may end it and answers the terminal for both."""
        if signal.getsignal(signal.SIGTERM) == self.note or self.listeners:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                of_all = number.name in ("SIGINT", "SIGHUP")  # a terminal sends them to parent and worker
                signal.signal(number, signal.SIG_IGN if of_all else signal.SIG_DFL)
        self.listeners.clear()


_outside = _Outside()
os.register_at_fork(after_in_child=_outside.forget)


def requeue(asked: int) -> None:
    """Where SLURM runs the job and its time is up, have the first rank ask it to start the job again."""
    job = job_to_requeue(asked)
    if job is None or shutil.which("scontrol") is None:
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        log.warning("scontrol requeue %s failed: %s; submit the job again", job, done.stderr.strip())


def job_to_requeue(asked: int) -> str | None:
    """The job that this process, stopped by `asked`, may start again as a whole; of an array only its own task.

    `#SBATCH --signal=USR1@120` says that the job's time is up before it is. SIGTERM is no reason: it comes with
    scancel, after which nobody wants the job back, and from a preemption, after which SLURM requeues by itself. Nor is
    trainer.max_time, where this run is not all that the job does: in a script with other commands, in a sweep.
    """
    if asked not in (signal.SIGUSR1, _TIME_IS_UP) or not in_slurm_job() or not is_first_rank():
        return None
    task = os.environ.get("SLURM_TASK_PID")  # what srun, or the job, has started
    own = os.getppid() if launcher() == "torchrun" else os.getpid()
    if asked == _TIME_IS_UP and (is_sweep() or task not in (None, str(own))):
        return None
    array = [os.environ.get(name) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")]
    return "{}_{}".format(*array) if all(array) else os.environ.get("SLURM_JOB_ID")
