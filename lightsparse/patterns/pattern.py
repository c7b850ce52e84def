"""Patterns: small frozen dataclasses that say which blocks a row reads, and their algebra (`|` unites, `&` intersects).

A pattern chooses whole blocks; inside a chosen block every token pair is allowed that causality and documents allow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightsparse.patterns.grid import BlockGrid, compact
from lightsparse.patterns.layout import BlockLayout, no_dense_rows
from lightsparse.patterns.mask import interval_mask


class Pattern:
    """Base of all patterns. A subclass is a frozen dataclass, hence its own cache key, with one method: `rows`."""

    def rows(self, grid: BlockGrid) -> Tensor:
        """Key blocks of each query block: int32 [B|1, H|Hkv|1, NQ, K], ascending, −1 padded."""
        raise NotImplementedError(f"{type(self).__name__} has no rows")

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        """Query blocks that read everything: int32 [R] (block ids, not row numbers)."""
        return no_dense_rows(grid.device)

    def __or__(self, other: Pattern) -> Pattern:
        return Union((self, other))

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection((self, other))

    def layout(
        self,
        seq_len: int,
        *,
        block: int = 64,
        heads: int = 1,
        kv_heads: int | None = None,
        causal: bool = True,
        device: torch.device | str = "cpu",
        rows: range | None = None,
        documents: Tensor | None = None,
    ) -> BlockLayout:
        """The layout of self-attention over `seq_len` tokens.

        block      tokens per block, of queries and keys
        rows       the query blocks wanted (decoding, ranks); None = all
        documents  int32 [B, seq_len], non-decreasing: packed documents read only themselves
        Time and memory O(rows · K). Raises ValueError for sizes below 1, rows outside the sequence, and documents of
        another length or with decreasing ids.
        """
        device = torch.device(device)
        num_blocks = -(-seq_len // block) if block > 0 else 0
        grid = BlockGrid(
            seq_len,
            block,
            heads,
            heads if kv_heads is None else kv_heads,
            causal,
            device,
            range(num_blocks) if rows is None else rows,
            None if documents is None else documents.to(device),
        )
        if grid.documents is not None and bool((grid.documents == grid.documents[:, :1]).all()):
            grid = replace(grid, documents=None)  # one document: nothing to isolate
        dense = self.dense_rows(grid)
        table = grid.of_shared_documents(self.rows(grid))
        if len(dense):
            is_dense = torch.isin(grid.row_ids, dense)[None, None, :, None]
            table = compact(table, (table >= 0) & ~is_dense)
        mask = interval_mask(seq_len, causal=causal, documents=grid.documents, device=device)
        if rows is not None:
            mask = mask.queries(rows.start * block, min(rows.stop * block, seq_len))
        return BlockLayout(table, block, block, mask, dense - grid.rows.start)


@dataclass(frozen=True)
class Union(Pattern):
    """A block is read when any part reads it."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        _require_parts(self)

    def rows(self, grid: BlockGrid) -> Tensor:
        table = side_by_side([part.rows(grid) for part in self.parts])
        return compact(table, table >= 0)

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        return torch.cat([part.dense_rows(grid) for part in self.parts]).unique()


@dataclass(frozen=True)
class Intersection(Pattern):
    """A block is read when every part reads it."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        _require_parts(self)

    def rows(self, grid: BlockGrid) -> Tensor:
        tables = [part.rows(grid) for part in self.parts]
        dense = torch.stack([torch.isin(grid.row_ids, part.dense_rows(grid)) for part in self.parts])  # [parts, NQ]
        if bool(dense.any()):
            tables = _with_stand_ins(tables, dense)
        together = side_by_side(tables).sort(dim=-1).values
        reach = len(tables) - 1  # each part lists a block once, so a block in all parts stands len(tables) times
        in_all = torch.zeros_like(together, dtype=torch.bool)
        if together.shape[-1] > reach:
            in_all[..., reach:] = together[..., reach:] == together[..., : together.shape[-1] - reach]
        return compact(together, in_all & (together >= 0))

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        common = self.parts[0].dense_rows(grid)
        for part in self.parts[1:]:
            common = common[torch.isin(common, part.dense_rows(grid))]
        return common


def _with_stand_ins(tables: list[Tensor], dense: Tensor) -> list[Tensor]:
    """The tables of an intersection where a part's dense rows list what the first part that is not dense there chooses.

    That is what an intersection with everything leaves, and no row becomes as wide as the sequence.
    """
    width = max(t.shape[-1] for t in tables)
    padded = [torch.nn.functional.pad(t, (0, width - t.shape[-1]), value=-1) for t in tables]
    stacked = torch.stack(same_heads(padded))  # [parts, B, H, NQ, K]
    first_sparse = dense.to(torch.int8).argmin(0).view(1, 1, 1, -1, 1)  # of each row; any part where all are dense
    stand_in = stacked.gather(0, first_sparse.expand(1, *stacked.shape[1:]))
    return list(torch.where(dense[:, None, None, :, None], stand_in, stacked))


def _require_parts(pattern: Union | Intersection) -> None:
    object.__setattr__(pattern, "parts", tuple(pattern.parts))  # a list would not be hashable
    if not pattern.parts:
        raise ValueError(f"{type(pattern).__name__}.parts is empty; it needs at least one pattern")


def side_by_side(tables: list[Tensor]) -> Tensor:
    """Tables of different batch and head dimensions, joined along K."""
    return torch.cat(same_heads(tables), dim=-1)


def same_heads(tables: list[Tensor]) -> list[Tensor]:
    """Tables [B|1, H|Hkv|1, NQ, K] brought to the largest batch and head dimensions; heads of a group share a table."""
    batch, heads = (max(t.shape[d] for t in tables) for d in (0, 1))
    return [t.repeat_interleave(heads // t.shape[1], 1).expand(batch, -1, -1, -1) for t in tables]
