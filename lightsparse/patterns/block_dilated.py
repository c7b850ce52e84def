"""Dilated segments in blocks: LongNet's pattern (Ding et al. 2023, arXiv 2307.02486, 2.2), one joint softmax."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.pattern import Pattern

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockDilated(Pattern):
    """For some (w, r): I and J lie in the same segment of w tokens, and J, counted in blocks from the segment's start,
    ≡ key/value head (mod r). The own block always.

    Residues differ by key/value head, so that r heads together cover every block; with fewer heads than r some blocks
    are read by nobody through this (w, r), which is logged.
    """

    segment_lengths: tuple[int, ...]  # tokens, multiples of the block
    dilation_rates: tuple[int, ...]  # blocks, one per segment length

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_lengths", tuple(self.segment_lengths))
        object.__setattr__(self, "dilation_rates", tuple(self.dilation_rates))
        if not self.segment_lengths or len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                f"BlockDilated.segment_lengths is {self.segment_lengths} and dilation_rates is {self.dilation_rates}; "
                "they need the same number of entries, at least one"
            )
        for name, values in (("segment_lengths", self.segment_lengths), ("dilation_rates", self.dilation_rates)):
            if min(values) < 1:
                raise ValueError(f"BlockDilated.{name} is {values}; every entry must be at least 1")

    def rows(self, grid: BlockGrid) -> Tensor:
        self.check_block(grid.block)
        _say_what_is_left_out(max(self.dilation_rates), grid.kv_heads)
        own = grid.row_ids[None, None, :, None]
        tables = [own.expand(1, grid.kv_heads, -1, -1)]
        for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True):
            width = min(w // grid.block, grid.num_kv)  # blocks in a segment
            segment_start = own.div(w // grid.block, rounding_mode="floor") * (w // grid.block)
            residue = torch.arange(grid.kv_heads, device=grid.device)[None, :, None, None] % r
            step = residue + torch.arange(0, width, r, device=grid.device)
            tables.append(torch.where(step < width, segment_start + step, -1).to(torch.int32))
        return grid.visible(torch.cat(tables, dim=-1))

    def check_block(self, block: int) -> None:
        for w in self.segment_lengths:
            if w % block:
                raise ValueError(
                    f"BlockDilated.segment_lengths is {self.segment_lengths}; every entry must be a multiple of the "
                    f"block, {block} tokens"
                )


@lru_cache(maxsize=64)  # once per process, not once per layer and step
def _say_what_is_left_out(rate: int, kv_heads: int) -> None:
    if rate > kv_heads:
        log.info("dilation rate %d with %d key/value heads: some blocks are read by no head through it", rate, kv_heads)
