"""Local window: the blocks near the own one (Longformer, Beltagy et al. 2020, arXiv 2004.05150, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.pattern import Pattern


@dataclass(frozen=True)
class LocalWindow(Pattern):
    """Block I reads block J when the two hold some pair with 0 ≤ i − j < window (causal) or |i − j| < window."""

    window: int  # tokens

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"LocalWindow.window is {self.window}; it counts tokens and must be at least 1")

    def rows(self, grid: BlockGrid) -> Tensor:
        # The farthest pair is the row's first query with a key window − 1 tokens before it.
        reach = min(-(-(self.window - 1) // grid.block), grid.num_kv)
        offsets = torch.arange(-reach, 1 if grid.causal else reach + 1, device=grid.device)
        return grid.visible(grid.row_ids[None, None, :, None] + offsets)
