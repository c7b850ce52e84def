"""Global tokens: everybody reads the first tokens of the document; without causality those tokens read everything too.

Longformer's global attention (arXiv 2004.05150, section 3.1), BigBird's (arXiv 2007.14062, section 2), and the sinks of
StreamingLLM (arXiv 2309.17453, section 3.2), at block granularity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.patterns.grid import BlockGrid, compact
from lightsparse.patterns.layout import no_dense_rows
from lightsparse.patterns.pattern import Pattern


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """Block J is read by everyone when it holds one of the first n (or, non-causal, last `trailing`) tokens of the
    row's document. Non-causal, such blocks' own rows read everything.
    """

    n: int  # tokens at the start of the document
    trailing: int = 0  # tokens at its end; they lie in the future, so only without causality

    def __post_init__(self) -> None:
        if self.n < 0 or self.trailing < 0 or self.n + self.trailing < 1:
            raise ValueError(
                f"GlobalTokens.n is {self.n} and trailing is {self.trailing}; "
                "both count tokens, at least 0, and one of them at least 1"
            )

    def rows(self, grid: BlockGrid) -> Tensor:
        if self.trailing and grid.causal:
            raise ValueError(
                f"GlobalTokens.trailing is {self.trailing}; trailing tokens lie in the future of a causal model, "
                "use trailing=0 or objective=mlm"
            )
        first, last = grid.document_spans()
        starts, ends = self._tokens_of_rows(grid)
        leading = min(self.n, grid.seq_len)
        trailing = min(self.trailing, grid.seq_len)
        spans = []
        if leading:
            # Documents of a row lie side by side. The first reaches back; those that begin inside the row have their
            # global tokens from there on, so one run of blocks from the row to the last one's covers them.
            spans.append((first[:, starts], torch.minimum(first[:, starts] + leading - 1, last[:, starts])))
            spans.append(
                (torch.maximum(first[:, ends], starts), torch.minimum(first[:, ends] + leading - 1, last[:, ends]))
            )
        if trailing:
            spans.append((torch.maximum(last[:, ends] - trailing + 1, first[:, ends]), last[:, ends]))
            spans.append((torch.maximum(last[:, starts] - trailing + 1, first[:, starts]), last[:, starts]))
        tables = [_blocks_between(start, end, grid) for start, end in spans]
        table = torch.cat([t.expand(max(len(u) for u in tables), -1, -1, -1) for t in tables], dim=-1)
        if grid.documents is not None and not grid.causal:
            table = self._with_wide_rows(table, grid)
        return grid.visible(table)

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        # With documents the dense rows differ by sample, so they stand in the table instead.
        if grid.causal or grid.documents is not None:
            return no_dense_rows(grid.device)
        leading_end = -(-min(self.n, grid.seq_len) // grid.block)
        trailing_start = max(grid.seq_len - self.trailing, 0) // grid.block if self.trailing else grid.num_kv
        ids = grid.row_ids
        return ids[(ids < leading_end) | (ids >= trailing_start)]

    def _tokens_of_rows(self, grid: BlockGrid) -> tuple[Tensor, Tensor]:
        """First and last token of each row: two int64 [NQ]."""
        starts = grid.row_ids.long() * grid.block
        return starts, (starts + grid.block - 1).clamp(max=grid.seq_len - 1)

    def _with_wide_rows(self, table: Tensor, grid: BlockGrid) -> Tensor:
        """Rows that hold a global token list every block of their own documents, which lie side by side."""
        first, last = grid.document_spans()
        position = torch.arange(grid.seq_len, device=grid.device)
        is_global = (position - first < self.n) | (last - position < self.trailing)
        padded = torch.nn.functional.pad(is_global, (0, grid.num_kv * grid.block - grid.seq_len))
        wide = padded.unflatten(1, (-1, grid.block)).any(-1)[:, grid.rows.start : grid.rows.stop]
        starts, ends = self._tokens_of_rows(grid)
        start = first[:, starts]
        every = _blocks_between(start, torch.where(wide, last[:, ends], start - 1), grid)
        table = torch.cat([table.expand(len(wide), -1, -1, -1), every], dim=-1)
        return compact(table, table >= 0)


def _blocks_between(start: Tensor, end: Tensor, grid: BlockGrid) -> Tensor:
    """Blocks holding tokens start … end of each row ([B, NQ] both): int32 [B, 1, NQ, K], −1 where end < start."""
    first, last = start.div(grid.block, rounding_mode="floor"), end.div(grid.block, rounding_mode="floor")
    width = int((last - first).max()) + 1 if first.numel() else 0
    blocks = first[..., None] + torch.arange(max(width, 0), device=grid.device)
    inside = (blocks <= last[..., None]) & (end >= start)[..., None]
    return torch.where(inside, blocks, -1).to(torch.int32)[:, None]
