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


@dataclass(frozen=True)
class AtDensity(Pattern):
    """`pattern` with its integer field `solve` chosen so that the density is within 2% (relative) of `target`.

    One step of a window or stride is a whole block in every row, too coarse for small grids. Between two steps a share
    of the rows, spread evenly by the golden ratio, takes the denser one, so every density between the pattern's least
    and greatest is reached.

    Raises ValueError when the pattern has no or several fields of that name, or the target lies outside what it reaches
    (the message names the nearest reachable values).
    """

    pattern: Pattern
    target: float  # share of dense tiles
    solve: str = "window"  # name of the free field, somewhere in the pattern
    at: int | None = None  # tokens: the length the target refers to, so that decoding keeps it; None = each length
    uniform: bool = False  # every row takes the same value, as a token-exact window must; fewer densities are reached

    def __post_init__(self) -> None:
        if not 0.0 < self.target <= 1.0:
            raise ValueError(f"AtDensity.target is {self.target}; it is a share of dense tiles and must lie in (0, 1]")
        found = _count(self.pattern, self.solve)
        if found != 1:
            raise ValueError(
                f"AtDensity.solve is {self.solve!r}; the pattern has {found or 'no'} integer fields of that name, and "
                "exactly one can be solved for a density"
            )

    def rows(self, grid: BlockGrid) -> Tensor:
        sparser, denser, share = self._solved(grid)
        low = sparser.rows(grid)
        if share == 0.0:
            return low
        high = denser.rows(grid)
        width = max(low.shape[-1], high.shape[-1])
        low, high = (torch.nn.functional.pad(t, (0, width - t.shape[-1]), value=-1) for t in (low, high))
        takes_denser = ((grid.row_ids.double() + 1) * _GOLDEN).frac() < share
        return torch.where(takes_denser[None, None, :, None], high, low)

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        return self._solved(grid)[0].dense_rows(grid)

    def solved(self, seq_len: int, *, block: int, heads: int = 1, kv_heads: int | None = None, causal: bool = True):
        """(sparser pattern, denser pattern, share of rows that take the denser one) for these sizes."""
        return _solve(self, self.at or seq_len, block, heads, heads if kv_heads is None else kv_heads, causal)

    def _solved(self, grid: BlockGrid) -> tuple[Pattern, Pattern, float]:
        return self.solved(grid.seq_len, block=grid.block, heads=grid.heads, kv_heads=grid.kv_heads, causal=grid.causal)


@lru_cache(maxsize=256)
def _solve(
    wanted: AtDensity, seq_len: int, block: int, heads: int, kv_heads: int, causal: bool
) -> tuple[Pattern, Pattern, float]:
    def density(pattern: Pattern) -> float:
        return pattern.layout(seq_len, block=block, heads=heads, kv_heads=kv_heads, causal=causal).density()

    def at(value: int) -> Pattern:
        return _with_value(wanted.pattern, wanted.solve, value)

    sparse_end, dense_end = 1, seq_len
    if density(at(sparse_end)) > density(at(dense_end)):  # a larger stride reads less
        sparse_end, dense_end = dense_end, sparse_end
    least, greatest = density(at(sparse_end)), density(at(dense_end))
    target = wanted.target
    for value, reached in ((sparse_end, least), (dense_end, greatest)):
        if abs(reached - target) <= TOLERANCE * target:
            return at(value), at(value), 0.0
    if not least < target < greatest:
        raise ValueError(
            f"density {target} is out of reach: {wanted.solve} = {sparse_end} … {dense_end} gives densities {least:.4g} "
            f"… {greatest:.4g} at {seq_len} tokens in blocks of {block}; choose one in between or change the pattern"
        )
    while abs(dense_end - sparse_end) > 1:  # density(sparse_end) < target <= density(dense_end)
        middle = (sparse_end + dense_end) // 2
        if density(at(middle)) < target:
            sparse_end = middle
        else:
            dense_end = middle
    low, high = density(at(sparse_end)), density(at(dense_end))
    nearest, reached = min(((sparse_end, low), (dense_end, high)), key=lambda found: abs(found[1] - target))
    if abs(reached - target) <= TOLERANCE * target:
        return at(nearest), at(nearest), 0.0
    if wanted.uniform:
        raise ValueError(
            f"density {target} is out of reach within {TOLERANCE:.0%}: the nearest are {low:.4g} ({wanted.solve} = "
            f"{sparse_end}) and {high:.4g} ({wanted.solve} = {dense_end}) at {seq_len} tokens in blocks of {block}; "
            "choose one of them or a smaller block"
        )
    return at(sparse_end), at(dense_end), (target - low) / (high - low)


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
