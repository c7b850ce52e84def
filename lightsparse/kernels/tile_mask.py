"""Masks of the tiles that need one: most tiles are read in full; only the rest is compared token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.patterns.layout import BlockLayout

_CHUNK = 1 << 22  # tile elements whose masks are built at once


@dataclass
class RowMask:
    """Of one row of the table: bias tiles to add to the scores, and whether some query may have nothing to read."""

    tiles: list[tuple[int, int, Tensor]]  # (table, key block, bias [q_block, kv_block] of 0 and −inf)
    may_be_empty: bool


class TileMasks:
    """RowMask of each row, built for many rows at once."""

    def __init__(self, layout: BlockLayout, table_TNK: Tensor, dtype: torch.dtype):
        """table_TNK: the layout's table expanded to the tables the kernel walks, [T, NQ, K]."""
        self.layout, self.table_TNK, self.dtype = layout, table_TNK, dtype
        full_TNK = _expanded(layout.full_tiles, table_TNK)
        self.partial_TNK = (table_TNK >= 0) & ~full_TNK
        self.no_full_row = (~full_TNK.any(-1)).any(0).tolist()  # only such a row can hold an empty query
        per_row = max(int(self.partial_TNK.sum((0, 2)).max()), 1) if table_TNK.numel() else 1
        self.rows_at_once = max(_CHUNK // (per_row * layout.q_block * layout.kv_block), 1)
        self.first, self.cached = 0, list[list[tuple[int, int, Tensor]]]()

    def row(self, row: int) -> RowMask:
        """Rows must be asked for in ascending order."""
        while row >= self.first + len(self.cached):
            self.first += len(self.cached)
            self.cached = self._build(self.first, self.first + self.rows_at_once)
        return RowMask(self.cached[row - self.first], self.no_full_row[row])

    def _build(self, start: int, stop: int) -> list[list[tuple[int, int, Tensor]]]:
        partial = self.partial_TNK[:, start:stop]
        t, row, entry = partial.nonzero(as_tuple=True)
        block = self.table_TNK[:, start:stop][t, row, entry].long()
        bias = self._bias(t, row + start, block)
        rows: list[list[tuple[int, int, Tensor]]] = [[] for _ in range(partial.shape[1])]
        for n, (of_table, of_row, of_block) in enumerate(zip(t.tolist(), row.tolist(), block.tolist(), strict=True)):
            rows[of_row].append((of_table, of_block, bias[n]))
        return rows

    def _bias(self, t: Tensor, row: Tensor, block: Tensor) -> Tensor:
        """0 where query i of the row may read key j of the block, else −inf: [n, q_block, kv_block]."""
        layout, mask = self.layout, self.layout.mask
        sample = t // max(len(self.table_TNK) // layout.full_tiles.shape[0], 1)
        q = row[:, None] * layout.q_block + torch.arange(layout.q_block, device=row.device)
        k = block[:, None] * layout.kv_block + torch.arange(layout.kv_block, device=row.device)
        inside = (k < layout.num_keys)[:, None, :]
        q, k = q.clamp(max=layout.num_queries - 1), k.clamp(max=layout.num_keys - 1)

        def at(values: Tensor, index: Tensor) -> Tensor:
            return values[(sample % values.shape[0])[:, None], index]

        position = at(mask.q_pos, q)[:, :, None]
        allowed = (at(mask.visible_from, k)[:, None] <= position) & (position < at(mask.visible_until, k)[:, None])
        allowed &= inside
        if mask.q_doc is not None and mask.kv_doc is not None:
            allowed &= at(mask.q_doc, q)[:, :, None] == at(mask.kv_doc, k)[:, None]
        return torch.zeros(allowed.shape, dtype=self.dtype, device=row.device).masked_fill_(~allowed, float("-inf"))


def _expanded(full_BHNK: Tensor, table_TNK: Tensor) -> Tensor:
    return full_BHNK.flatten(0, 1).expand_as(table_TNK)
