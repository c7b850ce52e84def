"""Coverage: the share of past tokens from which information can reach a query, in one layer and through several.

A layer carries information from token j to token i when some head of i reads j, or when i = j (the residual stream).
What reaches i through n layers is what one layer carries to the tokens that reach it through n − 1. A path says that
information can flow, not that it does; for weights see attention_mass.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightsparse.analysis.rows import chunks, dense_would_read, evenly, read_by
from lightsparse.patterns import BlockLayout


@dataclass(frozen=True)
class Coverage:
    """Of sampled queries, through `layers` layers. 1.0 = everything that dense attention reads in one layer."""

    layers: int
    per_query: Tensor  # float [R]: share of the tokens dense attention would read
    distances: tuple[tuple[int, int], ...]  # tokens: 0 ≤ start … stop − 1 from the query, doubling
    by_distance: tuple[float, ...]  # share over all sampled queries; NaN where none has a token at that distance

    @property
    def mean(self) -> float:
        return float(self.per_query.mean())


def coverage(
    layout: BlockLayout, layers: Sequence[int] = (1,), *, queries: int = 64, sample: int = 0
) -> list[Coverage]:
    """Coverage through each number of layers, all of them with this layout; see Coverage.

    layout   tokens only; keys appended to them (summaries) don't count
    queries  how many are sampled, evenly spaced
    sample   which sample of the batch, where layouts differ by documents
    Memory O((queries + rows of a chunk) · N), time O(N²) per layer beyond the first.
    """
    if not layers or min(layers) < 1:
        raise ValueError(f"layers is {tuple(layers)}; it counts layers, at least one number of at least 1")
    sampled = evenly(layout, queries)
    past = of_sample(dense_would_read(layout, sampled), sample)[0]
    found, results = reached(layout, sampled, 1, sample), {}
    for depth in range(1, max(layers) + 1):
        if depth > 1:
            found = one_layer_more(layout, found, sample)
        if depth in layers:
            results[depth] = _shares(depth, found & past, past, layout.mask.q_pos[:1, sampled][0])
    return [results[depth] for depth in layers]


def reached(layout: BlockLayout, queries: Tensor, layers: int = 1, sample: int = 0) -> Tensor:
    """Bool [R, N]: True where information from token j can reach query queries[r] through `layers` layers."""
    found = _read_by_some_head(layout, queries, sample)
    own = layout.mask.q_pos[min(sample, len(layout.mask.q_pos) - 1), queries].long()
    found[torch.arange(len(queries), device=found.device), own] = True
    for _ in range(layers - 1):
        found = one_layer_more(layout, found, sample)
    return found


def one_layer_more(layout: BlockLayout, found: Tensor, sample: int = 0) -> Tensor:
    """Bool [R, N]: `found` and the tokens that some token of `found` reads. Needs the rows of all tokens."""
    if layout.num_queries != layout.num_tokens:
        raise ValueError(
            f"the layout has {layout.num_queries} queries and {layout.num_tokens} tokens; several layers need a row "
            "for every token, build it without rows="
        )
    further = found.clone()
    everyone = torch.arange(layout.num_queries, device=found.device)
    for some in chunks(everyone[found.any(0)], layout.num_keys * layout.kv_indices.shape[1]):
        reads = _read_by_some_head(layout, some, sample)
        further |= (found[:, some].float() @ reads.float()) > 0
    return further


def of_sample(rows: Tensor, sample: int) -> Tensor:
    """[B|1, …] → […] of one sample of the batch."""
    return rows[sample if len(rows) > 1 else 0]


def _read_by_some_head(layout: BlockLayout, queries: Tensor, sample: int) -> Tensor:
    """Bool [R, N]."""
    return of_sample(read_by(layout, queries), sample)[..., : layout.num_tokens].any(0)


def _shares(layers: int, covered: Tensor, past: Tensor, position: Tensor) -> Coverage:
    distance = (position[:, None] - torch.arange(past.shape[1], device=past.device)).abs()
    bounds = [0, 1]
    while bounds[-1] < past.shape[1]:
        bounds.append(2 * bounds[-1])
    spans = tuple(pairwise(bounds))
    by_distance = []
    for start, stop in spans:
        there = past & (distance >= start) & (distance < stop)
        count = int(there.sum())
        by_distance.append(int((covered & there).sum()) / count if count else float("nan"))
    return Coverage(layers, covered.sum(1) / past.sum(1).clamp(min=1), spans, tuple(by_distance))
