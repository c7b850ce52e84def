"""Token streams cut into samples of one context: tokens, next-token labels, document ids and positions.

Sample i is stream[i·N : i·N + N + 1]: the last token is the label of the one before. Documents follow each other
without padding, so a sample may start and end inside a document; the first token of each document is `bos`.
Under `isolate` the documents of a sample get ids 0, 1, … and positions that start anew; under `concat` they are one.
Either way the last token of a document is followed by the label `bos`: this is how a model learns to stop.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightsparse.data.corpus import Tokens
from lightsparse.data.source import IGNORED


class PackedSamples(Dataset[dict[str, Tensor]]):
    """Training samples of a stream [tokens]; a rest shorter than a sample is left out.

    Items are asked for by sample id = epoch · len + index, which stays unique over the whole run.
    """

    def __init__(self, stream: Tokens, context: int, bos: int, isolate: bool):
        self.stream, self.context, self.bos, self.isolate = stream, context, bos, isolate

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.context

    def __getitem__(self, sample_id: int) -> dict[str, Tensor]:
        """tokens, labels, positions int64 [N], documents int32 [N], sample_ids int64 []."""
        return self.window(sample_id, sample_id % len(self) * self.context)

    def window(self, sample_id: int, start: int) -> dict[str, Tensor]:
        """The sample whose first token is stream[start]."""
        tokens = self.stream[start : start + self.context + 1].astype(np.int64)
        positions = np.arange(self.context)
        documents = np.zeros(self.context, dtype=np.int32)
        if self.isolate:
            is_start = tokens[:-1] == self.bos
            is_start[0] = True  # a document that began in an earlier sample is cut here
            documents = np.cumsum(is_start, dtype=np.int32) - np.int32(1)
            positions = positions - np.maximum.accumulate(np.where(is_start, positions, 0))
        return {
            "tokens": torch.from_numpy(tokens[:-1]),
            "labels": torch.from_numpy(tokens[1:].copy()),  # of its own memory: labels may be edited in place
            "documents": torch.from_numpy(documents),
            "positions": torch.from_numpy(positions),
            "sample_ids": torch.tensor(sample_id),
        }


class EvaluationSamples(PackedSamples):
    """Consecutive samples in which each of the first `limit` labels of the stream (all, if fewer) counts once.

    A last sample that would run past the limit is moved back to end at it, and what has counted before is ignored:
    no padding, whatever the context. Indices past the end give that sample with every label ignored, so that ranks
    can take equally many.
    """

    def __init__(self, stream: Tokens, context: int, bos: int, isolate: bool, *, limit: int):
        super().__init__(stream, context, bos, isolate)
        self.limit = min(limit, len(stream) - 1)

    def __len__(self) -> int:
        return -(-self.limit // self.context)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first = min(index * self.context, self.limit)
        start = max(0, min(first, self.limit - self.context))
        sample = self.window(index, start)
        counted = torch.arange(start, start + self.context)
        sample["labels"][(counted < first) | (counted >= self.limit)] = IGNORED
        return sample
