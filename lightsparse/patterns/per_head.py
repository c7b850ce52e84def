"""Another pattern for every head: some heads look near, others far, in one layer and one call of the kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.pattern import Pattern, same_heads


@dataclass(frozen=True)
class PerHead(Pattern):
    """Head h reads what parts[h] chooses for head h.

    As many parts as key/value heads: the query heads of a group share their part. As many as query heads: each has its
    own, and a group's keys are read once for each of them. Any other number is an error.
    A row that is dense for some heads only (non-causal global tokens) lists every block in their table, as wide as the
    sequence; give all parts the same global tokens where that matters.
    """

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))  # a list, as YAML gives it, would not be hashable
        if not self.parts:
            raise ValueError("PerHead.parts is empty; it needs one pattern per query head or key/value head")

    def rows(self, grid: BlockGrid) -> Tensor:
        self._check_count(grid)
        dense_everywhere = self.dense_rows(grid)
        tables = [_with_dense_rows(part, grid, dense_everywhere) for part in dict.fromkeys(self.parts)]
        width = max(t.shape[-1] for t in tables)
        padded = same_heads([pad(t, (0, width - t.shape[-1]), value=-1) for t in tables])
        of_part = dict(zip(dict.fromkeys(self.parts), padded, strict=True))
        # A part may itself differ by head: then head h takes its h-th table.
        heads = max(len(self.parts), padded[0].shape[1])
        per_part = heads // len(self.parts)
        own = [
            of_part[part].repeat_interleave(heads // of_part[part].shape[1], 1)[:, h * per_part : (h + 1) * per_part]
            for h, part in enumerate(self.parts)
        ]
        return torch.cat(own, dim=1)

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        common = self.parts[0].dense_rows(grid)
        for part in self.parts[1:]:
            common = common[torch.isin(common, part.dense_rows(grid))]
        return common

    def _check_count(self, grid: BlockGrid) -> None:
        if len(self.parts) not in (grid.heads, grid.kv_heads):
            raise ValueError(
                f"PerHead.parts holds {len(self.parts)} patterns; give one for each of the {grid.kv_heads} key/value "
                f"heads or each of the {grid.heads} query heads"
            )


def _with_dense_rows(part: Pattern, grid: BlockGrid, except_for: Tensor) -> Tensor:
    """The part's table, with the rows that are dense for this part but not for all listing every block."""
    table, dense = part.rows(grid), part.dense_rows(grid)
    dense = dense[~torch.isin(dense, except_for)]
    if not len(dense):
        return table
    every = grid.visible(torch.arange(grid.num_kv, device=grid.device))
    table, every = (pad(t, (0, grid.num_kv - t.shape[-1]), value=-1) for t in (table, every))
    return torch.where(torch.isin(grid.row_ids, dense)[None, None, :, None], every, table)
