"""Answers right or wrong: how a model is scored on data that asks (a task), one by one and whole examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.context_parallel.shard import ContextShard, sum_over
from lightsparse.data.source import IGNORED
from lightsparse.models.transformer import Transformer

COLUMNS = ("val_accuracy", "val_exact_match")  # of metrics.csv


@dataclass(frozen=True)
class Scores:
    """Sums over a set of examples, and what follows from them. Without any answer everything is nan."""

    right: float  # answer tokens that the model finds likeliest
    answers: float  # answer tokens
    exact: float  # examples with every answer token right
    examples: float

    @property
    def accuracy(self) -> float:
        return self.right / self.answers if self.answers else math.nan

    @property
    def exact_match(self) -> float:
        return self.exact / self.examples if self.examples else math.nan

    @property
    def row(self) -> dict[str, float]:
        """By column of metrics.csv."""
        return dict(zip(COLUMNS, (self.accuracy, self.exact_match), strict=True))


@torch.no_grad()
def answered(model: Transformer, hidden_BNE: Tensor, labels_BN: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, N] each: where something is asked, and where the likeliest token is the answer."""
    asked_BN = labels_BN != IGNORED
    right_BN = torch.zeros_like(asked_BN)
    right_BN[asked_BN] = model.logits(hidden_BNE[asked_BN]).argmax(-1) == labels_BN[asked_BN]
    return asked_BN, right_BN


def score_sums(model: Transformer, hidden_BNE: Tensor, labels_BN: Tensor, shard: ContextShard | None) -> Tensor:
    """The four sums of `Scores` over a batch, fp32; ranks that hold one sequence together have equal ones."""
    counts_2B = torch.stack([marks_BN.sum(1) for marks_BN in answered(model, hidden_BNE, labels_BN)]).float()
    if shard is not None:
        counts_2B = sum_over(counts_2B, shard)
    asked_B, right_B = counts_2B
    has_answers_B = asked_B > 0
    exact_B = has_answers_B & (right_B == asked_B)
    return torch.stack([right_B.sum(), asked_B.sum(), exact_B.sum(), has_answers_B.sum()])
