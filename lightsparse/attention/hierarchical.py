"""Hierarchical attention: near tokens one by one, farther ones through means of ever more tokens, under one softmax.

Every query covers every past token exactly once, by itself or by one summary, so nothing is out of reach at any
distance, and a token's cost is a few windows plus N / (coarsest stride).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor

from lightsparse.attention.core import AttentionConfig, AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.fixed import FixedPatternAttention, of_cached_keys
from lightsparse.attention.pooling.pooled_keys import (
    log_counts,
    own_segments,
    summary_sources,
    with_kept_summaries,
    with_summaries,
)
from lightsparse.attention.sharded_call import own_rows, sequence_length, sharded_attention
from lightsparse.context_parallel.key_owners import Sources
from lightsparse.patterns import AtDensity, Hierarchical, LocalWindow, Pattern, PooledHierarchy
from lightsparse.patterns.hierarchical import Levels, Segment, as_levels, check_nested

Preset = Literal["standard", "fine_grained", "long_range", "ultra_sparse"]

# Beside each: the most its density is, summaries included, in blocks of 64 at 4,096, 16,384 and 65,536 tokens.
PRESETS: dict[Preset, Levels] = {
    "standard": ((512, 1), (8192, 64), (None, 512)),  # 0.30, 0.10, 0.03
    "fine_grained": ((1024, 1), (8192, 16), (None, 64)),  # 0.52, 0.19, 0.065
    "long_range": ((256, 1), (8192, 32), (32768, 128), (None, 512)),  # 0.20, 0.075, 0.03
    "ultra_sparse": ((64, 1), (2048, 64), (None, 1024)),  # 0.10, 0.035, 0.01
}


@dataclass(frozen=True)
class HierarchicalConfig(AttentionConfig):
    preset: Preset | None = "standard"  # named levels; null: those in `levels`
    levels: Levels = ()  # [window in tokens, stride], finest first; the last window is null, the whole past
    reduce: Literal["mean"] | None = "mean"  # mean: one summary per `stride` tokens; null: every stride-th block itself
    log_count: bool = True  # reduce: mean only; log(stride) is added to a summary's score, so that it weighs `stride`
    block: int = 64  # keys per block, of tokens and summaries, and queries

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"attention.block is {self.block}; it counts tokens and must be at least 1")
        if self.preset is None and not self.levels:
            raise ValueError("attention.preset is null and attention.levels is empty; give one of them")
        if self.preset is not None and self.levels:
            raise ValueError(
                f"attention.preset is {self.preset} and attention.levels is {self.levels}; "
                "give one of them: attention.preset=null for levels of your own"
            )
        levels = as_levels(self.chosen_levels(), "attention.levels")
        check_nested(levels, "attention.levels")
        windows = [window for window, _ in levels if window is not None]
        if windows != sorted(windows):
            raise ValueError(
                f"attention.levels is {levels}; a coarser level's window must not be smaller than a finer one's"
            )

    def chosen_levels(self) -> Levels:
        return self.levels if self.preset is None else PRESETS[self.preset]

    def small(self) -> Self:
        return replace(self, preset=None, levels=((9, 1), (25, 4), (None, 16)), block=16)

    def full(self) -> Self:
        everything = tuple((None if w is None else 1 << 24, stride) for w, stride in self.chosen_levels())
        return replace(self, preset=None, levels=everything)


class BlockSparseHierarchical(FixedPatternAttention):
    """Tokens of a near window, and mean-pooled keys and values of everything before it.

    The scheme (levels, handover, documents) is ours. Its ideas are known: fine near and coarse far (H-Transformer-1D,
    Zhu & Soricut 2021, arXiv 2107.11906; Focal Transformer, Yang et al. 2021, arXiv 2107.00641), pooled memories
    (Compressive Transformer, Rae et al. 2019, arXiv 1911.05507), near, far and global blocks under one softmax
    (BigBird, Zaheer et al. 2020, arXiv 2007.14062), and log(size) added to the score of a merged token (ToMe, Bolya et
    al. 2022, arXiv 2210.09461, "proportional attention").

    Keys arrive after RoPE, so a summary's key is the mean of rotated keys: the fast-turning pairs of dimensions partly
    cancel, and what is left of them tells less about position the longer the stride. Its value is the plain mean. The
    summaries are functions of k and v and carry gradients to every token they stand for.

    Causal only: otherwise a summary would be read from far before its tokens and from far behind them, two intervals
    of query positions, where a key has one. Decoding keeps every summary, and each token as long as it is read itself.
    """

    Config = HierarchicalConfig
    needs_hidden_states = False
    supports_bidirectional = False

    def __init__(self, config: HierarchicalConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.block = config.block
        self.log_count = config.log_count
        (window, _), *coarser = config.chosen_levels()
        assert window is not None  # only the last level's is
        pooled = config.reduce == "mean"
        self.pattern: Pattern = (
            PooledHierarchy(window, tuple(coarser)) if pooled else LocalWindow(window) | Hierarchical(tuple(coarser))
        )
        if config.density is not None:
            self.pattern = self._solved(config.density, uniform=pooled)
        if pooled:  # a block of summaries may belong to several ranks
            self.context_parallel = tuple(way for way in self.context_parallel if way != "ring")

    def _solved(self, density: float, uniform: bool) -> Pattern:
        """The pattern with its near window such that the density is reached at the training context."""
        shape = self.shape
        if shape.context is None:
            raise ValueError(f"attention.density is {density}; give context, the length it refers to")
        wanted = AtDensity(self.pattern, density, "window", at=shape.context, uniform=uniform)
        sparser, _, _ = wanted.solved(
            shape.context, block=self.block, heads=shape.heads, kv_heads=shape.kv_heads, causal=shape.causal
        )
        return sparser if uniform else wanted

    def pattern_at(self, num_keys: int) -> Pattern:
        return self.pattern

    def split_granularity(self) -> int:
        coarsest = max(stride for _, stride in self.pattern.coarser) if isinstance(self.pattern, PooledHierarchy) else 1
        return math.lcm(self.block, coarsest)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        if not isinstance(self.pattern, PooledHierarchy):
            return super().attend(q, k, v, x=x, ctx=ctx)
        length = sequence_length(k, ctx)
        layout = self.layout(length, ctx, q.device)
        stats = {} if ctx.q_start else {"density": torch.tensor(layout.density(), device=q.device)}
        layout = own_rows(layout, ctx)
        segments, sources = self.pattern.segments(length, self.block), None
        if ctx.states is not None:
            strides, state = [stride for _, stride in self.pattern.coarser], ctx.states[self.shape.layer]
            keys, values = with_kept_summaries(k, v, length, strides, segments, self.block, state)
        else:
            here = segments
            if ctx.shard is not None:
                here = own_segments(ctx.shard.tokens, segments, self.block)
                sources = self._sources(segments, ctx, q.device)
            keys, values = (with_summaries(t, here, self.block) for t in (k, v))
        bias = log_counts(layout, segments, q.dtype) if self.log_count and len(segments) > 1 else None
        dropout = self.dropout(q, ctx)
        layout = of_cached_keys(layout, ctx)
        out = sharded_attention(q, keys, values, layout, ctx, sources=sources, block_bias=bias, dropout=dropout)
        return AttentionResult(out, stats=stats)

    def _sources(self, segments: tuple[Segment, ...], ctx: SequenceContext, device: torch.device) -> Sources:
        """Made once for a split: plans are cached by this object."""
        shard = ctx.shard
        assert shard is not None
        make = partial(summary_sources, shard.split, segments, self.block, device)
        return shard.plans.get(shard, (segments, self.block, device), make)
