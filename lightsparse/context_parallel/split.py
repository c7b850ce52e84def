"""Which rank of a context group holds which tokens of a sequence: whole units of tokens, in ascending order.

A unit is a multiple of every block, stride and segment that must not be cut (`AttentionCore.split_granularity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

SplitKind = Literal["contiguous", "head_tail", "balanced"]
_EVEN = 1.05  # load of the busiest rank ÷ mean load that "balanced" is content with
_MOST_PIECES = 16  # per rank; more of them cost more in keys fetched than balance gains


@dataclass(frozen=True)
class Split:
    """The owner of each unit. Equal splits are equal objects, so that what is planned for one can be kept.

    length  tokens of the whole sequence
    unit    tokens; the last unit may be short
    owners  rank of each unit; every rank owns one at least
    """

    length: int
    unit: int
    owners: tuple[int, ...]

    @cached_property
    def world(self) -> int:
        return max(self.owners) + 1

    @cached_property
    def rank_of(self) -> Tensor:
        """Rank that holds each token: int64 [length]."""
        return torch.tensor(self.owners).repeat_interleave(self.unit)[: self.length]

    @cached_property
    def row_of(self) -> Tensor:
        """Place of each token among those of its rank: int64 [length]."""
        rows = torch.empty(self.length, dtype=torch.int64)
        for rank in range(self.world):
            tokens = self.tokens(rank)
            rows[tokens] = torch.arange(len(tokens))
        return rows

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(torch.bincount(self.rank_of, minlength=self.world).tolist())

    def tokens(self, rank: int) -> Tensor:
        """The tokens of a rank, ascending: int64 [n]. Its own tensors hold them in this order."""
        return (self.rank_of == rank).nonzero().flatten()

    def runs(self, rank: int, block: int) -> list[tuple[int, int]]:
        """The same blocks as runs of neighbours: (first, behind the last)."""
        ids = self.blocks(rank, block)
        breaks = (torch.diff(ids) != 1).nonzero().flatten() + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in ids.tensor_split(breaks)]

    def blocks(self, rank: int, block: int) -> Tensor:
        """The blocks of `block` tokens that a rank holds, ascending; `block` must divide the unit: int64."""
        return self.tokens(rank).div(block, rounding_mode="floor").unique()


def split(kind: SplitKind, length: int, unit: int, world: int, loads: Sequence[float] | None = None) -> Split:
    """Split `length` tokens over `world` ranks.

    contiguous  one run of units per rank
    head_tail   two runs per rank, one from the front and its mirror image from the back: even for causal dense layouts
    balanced    as few runs per rank as bring the busiest rank within 5% of the mean of `loads` (per unit: what its rows
                cost); for equal loads that is contiguous, for dense causal ones head_tail
    Raises ValueError for another kind, a unit below 1, and fewer units than runs.
    """
    if kind not in get_args(SplitKind):
        raise ValueError(f"strategy.split is {kind!r}; it must be one of {', '.join(get_args(SplitKind))}")
    if unit < 1:
        raise ValueError(f"the unit of a split is {unit}; it counts tokens and must be at least 1")
    units = -(-length // unit)
    pieces = {"contiguous": 1, "head_tail": 2, "balanced": 1}[kind]
    if units < pieces * world:
        way_out = "contiguous needs half as many" if kind == "head_tail" else "use fewer ranks per sequence"
        raise ValueError(
            f"data.context is {length}, that is {units} units of {unit} tokens, which the attention's blocks and "
            f"strides forbid to cut; strategy.split={kind} over {world} ranks needs {pieces * world}: lengthen "
            f"data.context to {pieces * world * unit}, or {way_out}"
        )
    if kind == "contiguous":
        owners = _dealt(units, 1, world)
    elif kind == "head_tail":
        owners = _dealt(units, 2, world)
    else:
        owners = _balanced(list(loads) if loads is not None else [1.0] * units, units, world)
    return Split(length, unit, tuple(owners))


def _dealt(units: int, pieces: int, world: int, order: Sequence[int] | None = None) -> list[int]:
    """pieces · world runs of units, dealt to the ranks forth and back, in the given order of runs or their own."""
    runs = pieces * world
    rank_of_run = [0] * runs
    for place, run in enumerate(range(runs) if order is None else order):
        lap, seat = divmod(place, world)
        rank_of_run[run] = seat if lap % 2 == 0 else world - 1 - seat
    return [rank_of_run[run] for run in range(runs) for _ in range(units * run // runs, units * (run + 1) // runs)]


def _balanced(loads: list[float], units: int, world: int) -> list[int]:
    """The evenest deal, and among those within 5% of even the one with the fewest runs."""
    if len(loads) != units:
        raise ValueError(f"loads has {len(loads)} entries for {units} units; it needs one for each")
    best: tuple[float, list[int]] | None = None
    pieces = 1
    while pieces <= _MOST_PIECES and pieces * world <= units:
        runs = pieces * world
        of_run = [sum(loads[units * run // runs : units * (run + 1) // runs]) for run in range(runs)]
        # Stable: equal loads stay in order. One run per rank is as even in any order; its own keeps neighbours near.
        ranked = sorted(range(runs), key=of_run.__getitem__) if pieces > 1 else list(range(runs))
        owners = _dealt(units, pieces, world, ranked)
        peak = imbalance(owners, loads, world)
        if best is None or peak < best[0]:
            best = (peak, owners)
        if peak <= _EVEN:
            break
        pieces *= 2
    assert best is not None  # `split` has seen that there are units enough for one run per rank
    return best[1]


def imbalance(owners: Sequence[int], loads: Sequence[float], world: int) -> float:
    """Load of the busiest rank ÷ mean load; 1 is even."""
    of_rank = [0.0] * world
    for owner, load in zip(owners, loads, strict=True):
        of_rank[owner] += load
    return max(of_rank) * world / sum(of_rank) if sum(of_rank) else 1.0
