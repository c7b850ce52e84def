"""Learning-rate schedules: a share of the base rate as a function of the step, and of nothing else.

A schedule has no state, so a run that resumes, or is extended to more steps, needs none either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then the subclass's curve.

    The first optimizer step runs at 1/warmup_steps of the base rate, step number `warmup_steps` at all of it.
    """

    warmup_steps: int = 20  # optimizer steps

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps is {self.warmup_steps}; it counts steps and must be at least 0")

    def factor(self, step: int, max_steps: int) -> float:
        """Share of the base rate for the step that follows `step` finished ones, 0 ≤ step < max_steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step, max_steps)

    def after_warmup(self, step: int, max_steps: int) -> float:
        raise NotImplementedError(f"{type(self).__name__} has no curve")


@dataclass(frozen=True)
class Constant(Schedule):
    """The base rate from the end of the warm-up on."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 down to `final_share` at the last step (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    final_share: float = 0.1  # of the base rate

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("final_share", self.final_share)

    def after_warmup(self, step: int, max_steps: int) -> float:
        done = _progress(step, self.warmup_steps, max_steps)
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay: constant, then a straight line to `final_share` over the last `decay_share` of the steps.

    Hu et al. 2024 (MiniCPM), arXiv 2404.06395, section 4. The constant part may be extended without a restart.
    """

    decay_share: float = 0.3  # of max_steps
    final_share: float = 0.0  # of the base rate

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("decay_share", self.decay_share)
        _check_share("final_share", self.final_share)

    def after_warmup(self, step: int, max_steps: int) -> float:
        start = max(self.warmup_steps, max_steps - round(self.decay_share * max_steps))
        return 1 - (1 - self.final_share) * _progress(step, start - 1, max_steps)


def _progress(step: int, start: int, max_steps: int) -> float:
    """0 at step `start`, 1 at the last step, max_steps − 1; clipped to [0, 1]."""
    if step <= start:
        return 0.0
    return min(1.0, (step - start) / max(1, max_steps - 1 - start))


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"schedule.{name} is {value}; it is a share and must lie in [0, 1]")
