"""SIGTERM, as schedulers send it before they take a machine away: a flag that all ranks read at the same step.

A handler that saved by itself would stand in the middle of a step, and a signal to one rank only would leave the others
waiting in a collective. So the handler sets a flag, and the ranks agree on it after each optimizer step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and worth another try


class Preemption:
    """Whether SIGTERM has come to any rank. Does nothing outside the main thread, where Python has no signals."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None  # the handler that was there, while ours is

    def listen(self) -> None:
        """Replace the handler of SIGTERM. To be called after Lightning has put in its own, which ends with code 0."""
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, self._ask)
            self._before = before if before != self._ask else self._before

    def stop_listening(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def is_asked(self, trainer: Trainer) -> bool:
        """Equal on all ranks, which all must call this."""
        if trainer.world_size == 1:
            return self._asked
        asked = torch.tensor(float(self._asked), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(asked, reduce_op="max"))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
