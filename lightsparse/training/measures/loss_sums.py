"""Sums of a step or a validation, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Totals:
    """Sums over a set of targets, and what follows from them. Without any target everything is nan."""

    nats: float
    targets: float  # tokens that count
    bytes: float  # of text behind those tokens

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.targets if self.targets else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over all its micro-batches and ranks."""

    taken: bool  # False where it was skipped (health.py)
    totals: Totals
    density: float  # achieved by attention, mean over layers and micro-batches
    grad_norm: float  # before clipping
    learning_rate: float
    attention: dict[str, float]  # what it reports of itself, by column (attention_stats.step_columns)
