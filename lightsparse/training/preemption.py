"""Asked to stop, by a signal or because the time is up: a flag that all ranks read at the same step.

SIGTERM and SIGUSR1 are what schedulers send before they take a machine away, SIGINT is Ctrl-C. A handler that saved by
itself would stand in the middle of a step, and a signal to one rank only would leave the others waiting in a
collective. So a handler sets a flag, and the ranks agree on it after each optimizer step.
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
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightsparse.parallel.errors import EXIT_CODE as EXIT_CODE  # not done, and worth another try

log = logging.getLogger(__name__)

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
_TIME_IS_UP = 255  # stands for no signal


class Preemption:
    """Whether some rank has been asked to stop.

    max_time  seconds after which this rank asks by itself; None = never
    Signals need the main thread; outside it only the time counts. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self._asked = 0  # the number of the signal; 0 = not asked
        self._until = None if max_time is None else time.monotonic() + max_time
        self._before: dict[signal.Signals, Any] = {}  # the handlers that were there, while ours are

    def listen(self) -> None:
        """Replace the handlers. To be called after Lightning has put in its own, which end with code 0 or hang."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            before = signal.signal(number, self._ask)
            if before != self._ask:
                self._before[number] = before

    def stop_listening(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def is_asked(self, trainer: Trainer) -> bool:
        """Equal on all ranks, which all must call this."""
        if not self._asked and self._until is not None and time.monotonic() >= self._until:
            self._asked = _TIME_IS_UP
        if trainer.world_size > 1:
            asked = torch.tensor(float(self._asked), device=trainer.strategy.root_device)
            self._asked = int(trainer.strategy.reduce(asked, reduce_op="max"))
        return bool(self._asked)

    @property
    def reason(self) -> str:
        return "trainer.max_time" if self._asked == _TIME_IS_UP else signal.Signals(self._asked).name

    def requeue(self) -> None:
        """Ask SLURM to start the job again, where it runs one that may be and it was SLURM that asked to stop."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None or self._asked == signal.SIGINT or shutil.which("scontrol") is None:
            return
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if done.returncode:
            log.warning("scontrol requeue %s failed: %s; submit the job again", job, done.stderr.strip())

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._asked == signal.SIGINT:
                raise KeyboardInterrupt
            log.info("finishing the step, then saving it; Ctrl-C again leaves at once")
        self._asked = number
