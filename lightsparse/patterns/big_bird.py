"""BigBird: window, global and random blocks together (Zaheer et al. 2020, arXiv 2007.14062, section 2, "ITC")."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightsparse.patterns.global_tokens import GlobalTokens
from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.local_window import LocalWindow
from lightsparse.patterns.pattern import Pattern, Union
from lightsparse.patterns.random_blocks import RandomBlocks


@dataclass(frozen=True)
class BigBird(Pattern):
    """LocalWindow(window) | GlobalTokens(global_tokens) | RandomBlocks(random, seed, per_head).

    Without causality the last `global_tokens` tokens are global too, and the rows of global tokens read everything; a
    causal model has only the leading ones. Random blocks are drawn among all allowed blocks, so that one may fall on a
    block of the window; the paper's code draws outside of it.
    The paper's base model, bidirectional, is BigBird(window=b, global_tokens=b, random=3) for b = block = 64: a
    window of three blocks, the own one and one on either side.
    """

    window: int  # tokens: 0 ≤ i − j < window (causal) or |i − j| < window
    global_tokens: int  # at the start of the document and, non-causal, as many at its end; 0 = none
    random: int  # blocks per row; 0 = none
    seed: int = 0
    per_head: bool = False  # every key/value head draws its own random blocks, as in the paper's code

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"BigBird.window is {self.window}; it counts tokens and must be at least 1")
        if self.global_tokens < 0:
            raise ValueError(f"BigBird.global_tokens is {self.global_tokens}; it must be at least 0")
        if self.random < 0:
            raise ValueError(f"BigBird.random is {self.random}; it counts blocks and must be at least 0")

    def rows(self, grid: BlockGrid) -> Tensor:
        return self._union(grid.causal).rows(grid)

    def dense_rows(self, grid: BlockGrid) -> Tensor:
        return self._union(grid.causal).dense_rows(grid)

    def _union(self, causal: bool) -> Union:
        parts: list[Pattern] = [LocalWindow(self.window)]
        if self.global_tokens:
            parts.append(GlobalTokens(self.global_tokens, trailing=0 if causal else self.global_tokens))
        if self.random:
            parts.append(RandomBlocks(self.random, self.seed, self.per_head))
        return Union(tuple(parts))
