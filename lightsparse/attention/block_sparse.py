"""Block-sparse dilated attention: dilated segments united with any other patterns, one exact softmax per row.

The segments follow LongNet (Ding et al. 2023, arXiv 2307.02486, section 2.2), counted in blocks; unlike LongNet's sum
of separately normalised branches, a row has a single softmax over everything it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from lightsparse.attention.core import AttentionConfig, AttentionShape, SequenceContext
from lightsparse.attention.fixed import FixedPatternAttention
from lightsparse.kernels.weights import attention_weights, list_dense_rows
from lightsparse.patterns import AtDensity, BlockDilated, BlockLayout, GlobalTokens, LocalWindow, Pattern, Union

_EVERYTHING = LocalWindow(1 << 24)  # tokens; wider than any sequence
_NEARBY: dict[str, Pattern | None] = {"local": LocalWindow(256), "sinks": GlobalTokens(4)}


@dataclass(frozen=True)
class BlockSparseConfig(AttentionConfig):
    block: int = 128  # tokens per block, of queries and keys
    segment_lengths: tuple[int, ...] = (2048, 8192)  # tokens, multiples of the block; empty: only `pattern`
    dilation_rates: tuple[int, ...] = (4, 16)  # blocks, one per segment length
    # One more pattern, or several by name, of which null switches one off.
    pattern: Pattern | dict[str, Pattern | None] = field(default_factory=lambda: dict(_NEARBY))
    solve: str = "window"  # the integer field of the patterns that `density` solves

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"attention.block is {self.block}; it counts tokens and must be at least 1")
        if self.segment_lengths or self.dilation_rates:
            BlockDilated(self.segment_lengths, self.dilation_rates).check_block(self.block)
        if not self.parts():
            raise ValueError(
                "attention.segment_lengths and attention.pattern are both empty; give at least one segment or pattern"
            )

    def parts(self) -> tuple[Pattern, ...]:
        """The patterns whose union is read."""
        dilated = [BlockDilated(self.segment_lengths, self.dilation_rates)] if self.segment_lengths else []
        further = self.pattern.values() if isinstance(self.pattern, dict) else (self.pattern,)
        return (*dilated, *(part for part in further if part is not None))

    def small(self) -> Self:
        return replace(
            self, block=16, segment_lengths=(32, 64), dilation_rates=(1, 2), pattern={"local": LocalWindow(20)}
        )

    def full(self) -> Self:
        return replace(self, pattern={"local": _EVERYTHING})


class BlockSparseRingDilatedAttention(FixedPatternAttention):
    """Union of BlockDilated(segment_lengths, dilation_rates) and any patterns; O(N · K) time, O(N) memory.

    A row of queries has one softmax over the tokens of all blocks that it reads, causal or not. Shapes of a call:
    AttentionCore.forward. Raises ValueError for a density that cannot be reached at `context`.
    """

    Config = BlockSparseConfig

    def __init__(self, config: BlockSparseConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.block = config.block
        self.pattern: Pattern = Union(config.parts())
        if config.density == 1.0:  # exactly everything; solving stops within 2%
            self.pattern = _EVERYTHING
        elif config.density is not None:
            wanted = AtDensity(self.pattern, config.density, config.solve, at=shape.context)
            if shape.context is not None:  # refuse what cannot be reached now, not in the middle of a run
                wanted.solved(
                    shape.context, block=self.block, heads=shape.heads, kv_heads=shape.kv_heads, causal=shape.causal
                )
            self.pattern = wanted

    def pattern_at(self, num_keys: int) -> Pattern:
        return self.pattern

    def attention_weights(self, q: Tensor, k: Tensor, *, ctx: SequenceContext) -> tuple[Tensor, BlockLayout]:
        """The weights of this pass, before dropout, and the layout whose table says which key block each belongs to.

        q [B, H, Nq, D], k [B, Hkv, Nkv, D] → [B, H, NQ, K, block, block] fp32 (fp64 for fp64), differentiable. Those of
        a query sum to 1 over (K, block), or are all 0 if it has nothing to read. O(N · K) numbers; K counts all blocks
        if some row reads everything (bidirectional global tokens).
        """
        layout = list_dense_rows(self.layout(k.shape[2], ctx, q.device))
        return attention_weights(q, k, layout), layout
