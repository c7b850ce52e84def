"""Strided blocks: every `stride`-th key block, plus the own block.

Sparse Transformer's fixed pattern (Child et al. 2019, arXiv 1904.10509, section 4.3), counted in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.pattern import Pattern


@dataclass(frozen=True)
class Strided(Pattern):
    """Block I reads block J when J ≡ stride − 1 (mod stride), and its own block."""

    stride: int  # blocks

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"Strided.stride is {self.stride}; it counts blocks and must be at least 1")

    def rows(self, grid: BlockGrid) -> Tensor:
        columns = torch.arange(min(self.stride - 1, grid.num_kv), grid.num_kv, self.stride, device=grid.device)
        return grid.visible(columns, also_own=True)
