"""Which documents lie where in which sample, when samples may hold padding: aligned starts, or best fit.

Best fit (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830): a document of at most one
context is never cut. Longer ones fill samples of their own and leave a rest; rests and short documents, the longest
first, go into the fullest sample that still takes them. Deterministic: equal lengths keep the order of the stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightsparse.data.corpus import DocumentStream
from lightsparse.data.source import IGNORED


@dataclass(frozen=True)
class PackingPlan:
    """Segments in the order of their samples; int64 each."""

    first: np.ndarray  # [samples + 1]: sample i holds segments first[i] … first[i + 1] − 1
    document: np.ndarray  # [segments]: number of the document in the stream
    offset: np.ndarray  # [segments]: its first token in the document
    length: np.ndarray  # [segments]
    place: np.ndarray  # [segments]: its first token in the sample

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def tokens(self) -> int:
        return int(self.length.sum())


def sequential_plan(lengths: np.ndarray, context: int, align: int) -> PackingPlan:
    """Documents in order, each from the next multiple of `align` on, cut where a sample ends.

    lengths  tokens per document
    align    divides context
    """
    segments, cursor = [], 0
    for document, length in enumerate(lengths.tolist()):
        cursor = -(-cursor // align) * align
        offset = 0
        while offset < length:
            sample, place = divmod(cursor, context)
            part = min(length - offset, context - place)
            segments.append((sample, document, offset, part, place))
            offset, cursor = offset + part, cursor + part
    return _plan(segments)


def best_fit_plan(lengths: np.ndarray, context: int, align: int) -> PackingPlan:
    """No cut but those of documents longer than a context; see the top of the file. Arguments as above."""
    segments, rests, samples = [], [], 0
    for document, length in enumerate(lengths.tolist()):
        whole = length // context
        for part in range(whole):
            segments.append((samples, document, part * context, context, 0))
            samples += 1
        if length % context:
            rests.append((length % context, document, whole * context))
    room: dict[int, list[int]] = {}  # free tokens → samples that have so many
    sizes: list[int] = []  # the keys of `room`, ascending
    for length, document, offset in sorted(rests, key=lambda rest: -rest[0]):
        index = bisect_left(sizes, length)
        if index == len(sizes):
            sample, free = samples, context
            samples += 1
        else:
            free = sizes[index]
            sample = room[free].pop()
            if not room[free]:
                del room[free], sizes[index]
        segments.append((sample, document, offset, length, context - free))
        left = (free - length) // align * align  # the next one starts at a multiple of align
        if left:
            if left not in room:
                room[left] = []
                insort(sizes, left)
            room[left].append(sample)
    return _plan(sorted(segments))


def _plan(segments: list[tuple[int, int, int, int, int]]) -> PackingPlan:
    sample, document, offset, length, place = np.array(segments, dtype=np.int64).reshape(-1, 5).T
    order = np.lexsort((place, sample))
    samples = int(sample.max()) + 1 if len(sample) else 0
    first = np.searchsorted(sample[order], np.arange(samples + 1))
    return PackingPlan(first, document[order], offset[order], length[order], place[order])


class PlannedSamples(Dataset[dict[str, Tensor]]):
    """Samples of documents kept apart, as planned. Each run of padding is a document of its own whose labels are
    ignored; the last token of a document is followed by the label `bos`, in the stream as here.

    limit  labels that count, from the start; past the samples that hold them every label is ignored. None: all, and
           items are asked for by sample id = epoch · len + index
    """

    def __init__(self, stream: DocumentStream, plan: PackingPlan, context: int, bos: int, *, limit: int | None = None):
        self.stream, self.plan, self.context, self.bos, self.limit = stream, plan, context, bos, limit
        self._before = np.append(0, np.cumsum(plan.length))[plan.first]  # labels before each sample

    def __len__(self) -> int:
        if self.limit is None:
            return len(self.plan)
        return int(np.searchsorted(self._before, min(self.limit, self._before[-1])))

    def __getitem__(self, sample_id: int) -> dict[str, Tensor]:
        """tokens, labels, positions int64 [N], documents int32 [N], sample_ids int64 []."""
        index = sample_id % len(self) if self.limit is None else min(sample_id, len(self) - 1)
        tokens = np.full(self.context, self.bos, dtype=np.int64)
        labels = np.full(self.context, IGNORED, dtype=np.int64)
        starts, ends = [0], [0]
        for segment in range(self.plan.first[index], self.plan.first[index + 1]):
            document, offset, length, place = (
                int(column[segment])
                for column in (self.plan.document, self.plan.offset, self.plan.length, self.plan.place)
            )
            start = int(self.stream.starts[document]) + offset
            is_end = offset + length == self.stream.lengths[document]
            text = self.stream.tokens[start : start + length + (0 if is_end else 1)]
            tokens[place : place + length] = text[:length]
            labels[place : place + length - 1] = text[1:length]
            labels[place + length - 1] = self.bos if is_end else text[length]
            starts.append(place)
            ends.append(place + length)
        if self.limit is not None:
            counts = self.limit - int(self._before[index]) if sample_id == index else 0
            real = np.flatnonzero(labels != IGNORED)
            labels[real[max(0, counts) :]] = IGNORED
        borders = np.unique([*starts, *(end for end in ends if end < self.context), self.context])
        documents, positions = np.empty(self.context, dtype=np.int32), np.empty(self.context, dtype=np.int64)
        for number, (start, stop) in enumerate(pairwise(borders.tolist())):
            documents[start:stop] = number
            positions[start:stop] = np.arange(stop - start)
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "documents": torch.from_numpy(documents),
            "positions": torch.from_numpy(positions),
            "sample_ids": torch.tensor(sample_id),
        }
