"""Sliding window, exact to the token, with optional sinks.

Longformer's local attention (Beltagy et al. 2020, arXiv 2004.05150, section 3.1), as in Mistral 7B (arXiv 2310.06825,
section 2); sinks after StreamingLLM (Xiao et al. 2023, arXiv 2309.17453, section 3.2). A learned sink is a logit in the
softmax's denominator, so that a head can attend to nothing (gpt-oss: OpenAI 2025, arXiv 2508.10925, in
windows of 128 that alternate with dense layers: model.layer_pattern=SD).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from lightsparse.attention.core import AttentionConfig, AttentionShape
from lightsparse.attention.fixed import FixedPatternAttention
from lightsparse.patterns import AtDensity, BlockGrid, BlockLayout, GlobalTokens, LocalWindow, Pattern, interval_mask
from lightsparse.patterns.grid import compact
from lightsparse.patterns.pattern import side_by_side


@dataclass(frozen=True)
class SlidingWindowConfig(AttentionConfig):
    window: int = 1024  # tokens: a query reads keys with 0 ≤ i − j < window (bidirectional: |i − j| < window)
    sinks: int = 4  # tokens at the start of each document that every query reads
    learned_sink: bool = False  # a learned logit per query head, from 0, in the softmax's denominator
    block: int = 64  # tokens per tile of the computation; changes the speed and the density, never the result

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(
                f"attention.window is {self.window}; a window counts tokens and must be at least 1. "
                "For no window use attention=dense."
            )
        if self.sinks < 0:
            raise ValueError(f"attention.sinks is {self.sinks}; it counts tokens and must be at least 0")
        if self.block < 1:
            raise ValueError(f"attention.block is {self.block}; it counts tokens and must be at least 1")

    def small(self) -> Self:
        return replace(self, window=21, sinks=3, block=16)

    def full(self) -> Self:
        return replace(self, window=1 << 24, learned_sink=False)


@dataclass(frozen=True)
class _Covering(Pattern):
    """The blocks that hold some token of the window or a sink."""

    window: int  # tokens
    sinks: int  # tokens

    def rows(self, grid: BlockGrid) -> Tensor:
        parts: list[Pattern] = [LocalWindow(self.window)]
        if self.sinks:
            parts.append(GlobalTokens(self.sinks))
        table = side_by_side([part.rows(grid) for part in parts])
        return compact(table, table >= 0)


class SlidingWindowAttention(FixedPatternAttention):
    """Each token reads the `window` tokens up to itself and the first `sinks` tokens of its document; O(N · window).

    Shapes of a call: AttentionCore.forward. Raises ValueError for a density that cannot be reached at `context`.
    """

    Config = SlidingWindowConfig

    def __init__(self, config: SlidingWindowConfig, shape: AttentionShape):
        super().__init__(config, shape, learned_sink=config.learned_sink)
        self.block = config.block
        self.pattern: Pattern = _Covering(config.window, config.sinks)
        if config.density is not None:
            if shape.context is None:
                raise ValueError(f"attention.density is {config.density}; give context, the length it refers to")
            wanted = AtDensity(self.pattern, config.density, "window", uniform=True)
            self.pattern, _, _ = wanted.solved(
                shape.context, block=self.block, heads=shape.heads, kv_heads=shape.kv_heads, causal=shape.causal
            )

    def pattern_at(self, num_keys: int) -> Pattern:
        return self.pattern

    @staticmethod
    def finish(layout: BlockLayout, pattern: Pattern, documents: Tensor | None) -> BlockLayout:
        assert isinstance(pattern, _Covering)
        mask = interval_mask(
            layout.num_keys,
            causal=layout.mask.causal,
            window=min(pattern.window, layout.num_keys),
            sinks=pattern.sinks,
            documents=documents,
            device=layout.mask.device,
        )
        start = layout.num_keys - layout.num_queries
        return replace(layout, mask=mask.queries(start, layout.num_keys))
