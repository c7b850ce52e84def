"""A pattern solved for a density: the one word users sweep, `attention.density=0.1`, means what it says."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.pattern import Pattern

TOLERANCE = 0.02  # relative
_GOLDEN = 0.6180339887498949
_PROBE = 64  # blocks


class OutOfReach(ValueError):
    """No density near enough to the target can be reached."""


@dataclass(frozen=True)
class AtDensity(Pattern):
    """`pattern` with its integer field `solve` chosen so that the density is within 2% (relative) of `target`.

    One step of a window or stride is a whole block in every row, too coarse for small grids. Between two steps some of
    the rows, spread evenly by the golden ratio, take the denser one; what is left is the step of a single row.

    Raises ValueError when the pattern has no or several fields of that name, and OutOfReach when no density within 2%
    can be reached (the message names the nearest that can).
    """

    pattern: Pattern
    target: float  # share of dense tiles
    solve: str = "window"  # name of the free field, somewhere in the pattern
    at: int | None = None  # tokens: the length the target refers to, so that decoding keeps it; None = each length
    uniform: bool = False  # every row takes the same value, as a token-exact window must; fewer densities are reached

    def __post_init__(self) -> None:
        if not 0.0 < self.target <= 1.0:
            raise ValueError(f"AtDensity.target is {self.target}; it is a share of dense tiles and must lie in (0, 1]")
        if self.at is not None and self.at < 1:
            raise ValueError(f"AtDensity.at is {self.at}; it counts tokens and must be at least 1 (null: each length)")
        found = _count(self.pattern, self.solve)
        if found != 1:
            raise ValueError(
                f"AtDensity.solve is {self.solve!r}; the pattern has {found or 'no'} integer fields of that name, and "
                "exactly one can be solved for a density"
            )

    def rows(self, grid: BlockGrid) -> Tensor:
        return self._mixture(grid).rows(grid)

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        return self._mixture(grid).dense_rows(grid)

    def solved(self, seq_len: int, *, block: int, heads: int = 1, kv_heads: int | None = None, causal: bool = True):
        """(sparser pattern, denser pattern, share of rows that take the denser one) for these sizes."""
        found = _solve(self, self.at or seq_len, block, heads, heads if kv_heads is None else kv_heads, causal)
        return found.sparser, found.denser, found.share

    def _mixture(self, grid: BlockGrid) -> _Mixture:
        return _Mixture(
            *self.solved(grid.seq_len, block=grid.block, heads=grid.heads, kv_heads=grid.kv_heads, causal=grid.causal)
        )


@dataclass(frozen=True)
class _Mixture(Pattern):
    """`denser` in a share of the rows, the same ones whatever the length, and `sparser` in the rest."""

    sparser: Pattern
    denser: Pattern
    share: float = 0.0

    def rows(self, grid: BlockGrid) -> Tensor:
        low = self.sparser.rows(grid)
        if self.share == 0.0:
            return low
        high = self.denser.rows(grid)
        width = max(low.shape[-1], high.shape[-1])
        low, high = (torch.nn.functional.pad(t, (0, width - t.shape[-1]), value=-1) for t in (low, high))
        return torch.where(self._takes_denser(grid.row_ids)[None, None, :, None], high, low)

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        low = self.sparser.dense_rows(grid)
        if self.share == 0.0:
            return low
        high = self.denser.dense_rows(grid)
        return torch.cat([low[~self._takes_denser(low)], high[self._takes_denser(high)]]).unique()

    def _takes_denser(self, row_ids: Tensor) -> Tensor:
        return _place(row_ids) < self.share


def _place(row_ids: Tensor) -> Tensor:
    """A number in [0, 1) per row; any run of rows has them spread evenly: fp64 [rows]."""
    return ((row_ids.double() + 1) * _GOLDEN).frac()


@lru_cache(maxsize=256)
def _solve(wanted: AtDensity, seq_len: int, block: int, heads: int, kv_heads: int, causal: bool) -> _Mixture:
    """The mixture nearest to the target. No layout is built that is much denser than the target."""
    target, solve = wanted.target, wanted.solve
    where = f"at {seq_len} tokens in blocks of {block}"

    def density(pattern: Pattern, tokens: int = seq_len) -> float:
        return pattern.layout(tokens, block=block, heads=heads, kv_heads=kv_heads, causal=causal).density()

    def at(value: int) -> Pattern:
        return _with_value(wanted.pattern, solve, value)

    def near(reached: float) -> bool:
        return abs(reached - target) <= TOLERANCE * target

    few = min(seq_len, _PROBE * block)  # enough to see whether a larger value reads more (window) or less (stride)
    grows = density(at(1), few) <= density(at(few), few)
    sparser, end = (1, seq_len) if grows else (seq_len, 1)
    low = density(at(sparser))
    if low >= target and not near(low):
        raise OutOfReach(
            f"density {target} is out of reach: the least is {low:.4g} ({solve} = {sparser}) {where}; choose that or "
            "more, or change the pattern"
        )
    denser, high = sparser, low
    while high < target and denser != end:  # from the sparse end, so that no table much wider than wanted is built
        sparser, low = denser, high
        denser = min(2 * denser, seq_len) if grows else max(denser // 2, 1)
        high = density(at(denser))
    if high < target and not near(high):
        raise OutOfReach(
            f"density {target} is out of reach: the greatest is {high:.4g} ({solve} = {denser}) {where}; choose that "
            "or less, or change the pattern"
        )
    while abs(denser - sparser) > 1:  # density(sparser) < target <= density(denser)
        middle = (sparser + denser) // 2
        reached = density(at(middle))
        if reached < target:
            sparser, low = middle, reached
        else:
            denser, high = middle, reached
    nearest, reached = min(((sparser, low), (denser, high)), key=lambda found: abs(found[1] - target))
    if near(reached):
        return _Mixture(at(nearest), at(nearest))
    if wanted.uniform:
        raise OutOfReach(
            f"density {target} is out of reach within {TOLERANCE:.0%}: the nearest are {low:.4g} ({solve} = {sparser}) "
            f"and {high:.4g} ({solve} = {denser}) {where}; choose one of them or a smaller block"
        )

    places = _place(torch.arange(-(-seq_len // block))).sort().values.tolist()

    def mixture(rows: int) -> _Mixture:
        """With `rows` rows that take the denser pattern."""
        between = (places[rows - 1] + places[rows]) / 2 if 0 < rows < len(places) else float(rows > 0)
        return _Mixture(at(sparser), at(denser), between)

    some, more = 0, len(places)
    while more - some > 1:  # density(mixture(some)) < target <= density(mixture(more))
        middle = (some + more) // 2
        reached = density(mixture(middle))
        if reached < target:
            some, low = middle, reached
        else:
            more, high = middle, reached
    rows, reached = min(((some, low), (more, high)), key=lambda found: abs(found[1] - target))
    if near(reached):
        return mixture(rows)
    raise OutOfReach(
        f"density {target} is out of reach within {TOLERANCE:.0%}: the nearest are {low:.4g} and {high:.4g} ({solve} = "
        f"{sparser} or {denser}, differing by row) {where}; choose one of them or a smaller block"
    )


def _count(pattern: Any, name: str) -> int:
    """How many integer fields `name` the pattern and its parts have."""
    if isinstance(pattern, tuple):
        return sum(_count(part, name) for part in pattern)
    if not is_dataclass(pattern):
        return 0
    here = isinstance(getattr(pattern, name, None), int)
    return here + sum(_count(getattr(pattern, f.name), name) for f in fields(pattern))


def _with_value(pattern: Any, name: str, value: int) -> Any:
    """The pattern with its one field `name` set."""
    if isinstance(pattern, tuple):
        return tuple(_with_value(part, name, value) for part in pattern)
    if not is_dataclass(pattern) or isinstance(pattern, type):
        return pattern
    if isinstance(getattr(pattern, name, None), int):
        return replace(pattern, **{name: value})
    return replace(pattern, **{f.name: _with_value(getattr(pattern, f.name), name, value) for f in fields(pattern)})
