"""BigBird: a window, global tokens and random blocks under one exact softmax.

Zaheer et al. 2020, arXiv 2007.14062, section 2 ("ITC"). The random blocks shorten the path between any two tokens to a
few layers; all layers share one draw and with it one layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from lightsparse.attention.core import AttentionConfig, AttentionShape
from lightsparse.attention.fixed import FixedPatternAttention
from lightsparse.patterns import AtDensity, BigBird, LocalWindow, Pattern

_EVERYTHING = 1 << 24  # tokens; wider than any sequence


@dataclass(frozen=True)
class BigBirdConfig(AttentionConfig):
    block: int = 64  # tokens per block, of queries and keys
    window: int = 192  # tokens, in whole blocks: 0 ≤ i − j < window (bidirectional: |i − j| < window)
    global_tokens: int = 64  # at the start of each document, and bidirectional as many at its end; 0 = none
    random: int = 3  # blocks per row; 0 = none
    seed: int = 0  # of the random blocks; not the run's seed, so that another run keeps the pattern
    per_head: bool = False  # every key/value head draws its own, as in the paper's code: more is linked, at some speed
    solve: Literal["window", "global_tokens", "random"] = "window"  # the field that `density` solves

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("block", 1), ("window", 1), ("global_tokens", 0), ("random", 0)):
            if getattr(self, name) < least:
                unit = "blocks" if name == "random" else "tokens"
                raise ValueError(
                    f"attention.{name} is {getattr(self, name)}; it counts {unit} and must be at least {least}"
                )

    def small(self) -> Self:
        return replace(self, block=16, window=20, global_tokens=5, random=1)

    def full(self) -> Self:
        return replace(self, window=_EVERYTHING)


class BigBirdAttention(FixedPatternAttention):
    """Each block reads its window, the global tokens and `random` drawn blocks; O(N · K) time, O(N) memory.

    Zaheer et al. 2020, arXiv 2007.14062, section 2. Shapes of a call: AttentionCore.forward. Raises ValueError for a
    density that cannot be reached at `context`.
    """

    Config = BigBirdConfig

    def __init__(self, config: BigBirdConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.block = config.block
        self.pattern: Pattern = BigBird(
            config.window, config.global_tokens, config.random, config.seed, config.per_head
        )
        if config.density == 1.0:  # exactly everything; solving stops within 2%
            self.pattern = LocalWindow(_EVERYTHING)
        elif config.density is not None:
            wanted = AtDensity(self.pattern, config.density, config.solve, at=shape.context)
            if shape.context is not None:  # refuse what cannot be reached now, not in the middle of a run
                wanted.solved(
                    shape.context, block=self.block, heads=shape.heads, kv_heads=shape.kv_heads, causal=shape.causal
                )
            self.pattern = wanted

    def pattern_at(self, num_keys: int) -> Pattern:
        return self.pattern
