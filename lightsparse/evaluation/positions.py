"""Loss by position: how much better a model predicts a token, the more of its text it has read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightsparse.data.source import IGNORED, SampleSet
from lightsparse.evaluation.buckets import edges, sums
from lightsparse.evaluation.subject import Subject


def by_position(subject: Subject, samples: SampleSet, token_bytes: Tensor) -> list[dict[str, Any]]:
    """One row per bucket of positions that holds a target: start, end (excluded), targets, loss, bits_per_byte.

    samples      of one document each, or packed as one: positions count from the start of the sample
    token_bytes  int64 [vocabulary]; where targets stand for no text, bits_per_byte is None
    """
    ends = edges(len(samples[0]["tokens"]))
    totals = torch.zeros(len(ends), 3, dtype=torch.float64)
    for index in range(len(samples)):
        sample = samples[index]
        labels_N = sample["labels"]
        nats_N = subject.losses(sample["tokens"][None], labels_N[None])[0].cpu()
        counts_N = labels_N != IGNORED
        bytes_N = token_bytes[labels_N.clamp(min=0)] * counts_N
        totals += sums(torch.stack([nats_N, counts_N, bytes_N], 1), torch.arange(len(labels_N)), ends)
    rows = []
    for start, end, (nats, targets, text_bytes) in zip([0, *ends], ends, totals.tolist(), strict=False):
        if targets:
            bits = nats / math.log(2) / text_bytes if text_bytes else None
            row = {"start": start, "end": end, "targets": int(targets), "loss": nats / targets, "bits_per_byte": bits}
            rows.append(row)
    return rows
