"""Answers by distance: how often a model is right, by the tokens between an answer and the farthest that it needs."""

from __future__ import annotations

from typing import Any

import torch

from lightsparse.data.source import IGNORED, SampleSet
from lightsparse.evaluation.buckets import edges, sums
from lightsparse.evaluation.subject import Subject

_TOKENS = 16_384  # in a batch


def by_distance(subject: Subject, samples: SampleSet, reach: int | None = None) -> list[dict[str, Any]]:
    """One row per bucket of distances that holds an answer: start, end (excluded), answers, accuracy, loss.

    samples  of a task: `evidence` says the distance
    reach    distance that the buckets are cut at besides (layers × window, say): no row holds both sides of it
    """
    longest = len(samples[0]["tokens"]) + 1
    ends = sorted({*edges(longest), *([reach + 1] if reach is not None and reach + 1 < longest else [])})
    totals = torch.zeros(len(ends), 3, dtype=torch.float64)
    for batch in batches(samples):
        asked_BN = batch["labels"] != IGNORED
        labels_T, logits_TV = batch["labels"][asked_BN], subject.logits(batch["tokens"], asked_BN).cpu()
        right_T = logits_TV.argmax(-1) == labels_T
        nats_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
        totals += sums(torch.stack([torch.ones_like(nats_T), right_T, nats_T], 1), batch["evidence"][asked_BN], ends)
    return [
        {"start": start, "end": end, "answers": int(answers), "accuracy": right / answers, "loss": nats / answers}
        for start, end, (answers, right, nats) in zip([0, *ends], ends, totals.tolist(), strict=False)
        if answers
    ]


def batches(samples: SampleSet) -> list[dict[str, torch.Tensor]]:
    """The samples, several short ones at a time."""
    size = max(1, _TOKENS // len(samples[0]["tokens"]))
    groups = [range(first, min(first + size, len(samples))) for first in range(0, len(samples), size)]
    return [torch.utils.data.default_collate([samples[index] for index in group]) for group in groups]
