"""Steps that would do harm: a loss or gradient that is NaN or infinite, a loss far above the last ones.

Such a step is skipped: weights, momenta and averages stay as they were, the schedule and the data advance. A few in a
row end the run, with the batch and the weights on disk (`lightsparse replay`).
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import torch

from lightsparse.config.schema import HealthConfig
from lightsparse.utils.atomic_files import atomic_write


class NonFiniteError(RuntimeError):
    """Too many steps in a row were skipped. The weights and every checkpoint are from before them."""


class Health:
    """Judges each step by what all ranks know, so that all ranks judge alike."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.skipped = 0  # steps, of the whole run
        self.in_a_row = 0  # of them, up to now
        self._losses: deque[float] = deque(maxlen=config.spike_window)  # of the last steps that were taken

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Why the step is to be skipped, or None; counts it.

        loss       nats per target, over all ranks
        grad_norm  before clipping
        """
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self.in_a_row = 0
            self._losses.append(loss)
        else:
            self.in_a_row += 1
            self.skipped += 1
        return reason

    @property
    def is_over(self) -> bool:
        """Whether more steps in a row were objected to than the config allows."""
        return self.in_a_row > self.config.skip_steps

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses.clear()
        self._losses.extend(state["losses"])

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        for what, value in (("loss", loss), ("gradient's norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {what} is {value}"
        if self.config.spike is None or len(self._losses) < self.config.spike_window:
            return None  # too early to say what is usual
        usual = sum(self._losses) / len(self._losses)
        if loss <= self.config.spike * usual:
            return None
        return f"the loss is {loss:.4g}, {loss / usual:.3g} times the mean of the last {self.config.spike_window} steps"


def replay_file(folder: Path, step: int, rank: int) -> Path:
    """Where the batch of a step that ended a run lies, one file per rank."""
    return folder / "replay" / f"step-{step}-rank-{rank}.pt"


def save_for_replay(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(content, file)
