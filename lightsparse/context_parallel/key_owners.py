"""Where the keys of a layout live: which rank has the row of each key, and where in its own table.

Shapes: B samples, H heads, Z = B · H, n keys of this rank, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.context_parallel.split import Split

NOWHERE = -1  # the rank of a key that nobody holds (padding): it reads as 0


@dataclass(frozen=True, eq=False)
class Sources:
    """Of each key the rank that holds it (or NOWHERE) and the row in that rank's table: int64 [G, keys].

    side_by_side: G is 1 and a row holds a key of all samples and heads, [n, Z · width]; otherwise G is the samples ×
    key/value heads of the layout, each with rows of its own in the table [Z · n, width].
    """

    rank_of: Tensor
    row_of: Tensor
    rows_of_rank: tuple[int, ...]  # rows per sample and head of each rank's table
    side_by_side: bool = True

    def by_head(self, z: int) -> Sources:
        """The same keys with a row for each of z samples × heads."""
        if not self.side_by_side:
            return self
        held = torch.tensor([*self.rows_of_rank, 0], device=self.rank_of.device)[self.rank_of]
        rows = self.row_of + held * torch.arange(z, device=self.rank_of.device)[:, None]
        return Sources(self.rank_of.expand(z, -1), rows, self.rows_of_rank, side_by_side=False)


def token_sources(split: Split, device: torch.device) -> Sources:
    """Keys that are the tokens of the sequence."""
    return Sources(split.rank_of.to(device)[None], split.row_of.to(device)[None], split.counts)


def as_table(*parts: Tensor, side_by_side: bool) -> Tensor:
    """Parts [B, H, n, D] → the table [n, B · H · D] side by side, or [B · H · n, D], with D that of all parts together.

    One copy, whatever the strides of the parts.
    """
    if side_by_side:
        parts = tuple(x.permute(2, 0, 1, 3) for x in parts)
    table = torch.cat(parts, dim=-1)
    return table.flatten(1) if side_by_side else table.flatten(0, 2)


def from_table(table: Tensor, side_by_side: bool, batch: int, heads: int) -> Tensor:
    """The inverse of as_table: [B, H, n, D]."""
    if side_by_side:
        return table.view(len(table), batch, heads, table.shape[1] // (batch * heads)).permute(1, 2, 0, 3)
    return table.view(batch, heads, len(table) // (batch * heads), table.shape[1])
