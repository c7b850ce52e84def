"""Dense attention: the yardstick. PyTorch's fused kernel, document by document where documents are packed.

With a pattern it is attention over that pattern: dense attention intersected with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightsparse.attention.core import AttentionConfig, AttentionResult, AttentionShape, KeyExpiry, SequenceContext
from lightsparse.attention.fixed import FixedPatternAttention
from lightsparse.patterns import LocalWindow, Pattern


@dataclass(frozen=True)
class DenseConfig(AttentionConfig):
    pattern: Pattern | None = None  # only pairs that this pattern reads; null: every pair
    block: int = 64  # tokens per block of the pattern's grid; without a pattern, of pictures, dropout and decoding

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"attention.block is {self.block}; it counts tokens and must be at least 1")
        if self.density is not None and (self.density != 1.0 or self.pattern is not None):
            raise ValueError(
                f"attention.density is {self.density}; dense attention has no parameter to solve for it, "
                "use attention=block_sparse"
            )

    def small(self) -> Self:
        return replace(self, block=16)

    def full(self) -> Self:
        return replace(self, pattern=None)


class DenseAttention(FixedPatternAttention):
    """Every token reads every token before it (causal) or every token, where the pattern, if any, allows it."""

    Config = DenseConfig
    config: DenseConfig
    needs_hidden_states = False

    def __init__(self, config: DenseConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.block = config.block
        if config.pattern is not None:
            refuse_unfit(config.pattern, shape, config.block)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        dropout, several = self.training and self.config.dropout, ctx.q_start and q.shape[2] > 1
        if self.config.pattern is not None or several or dropout or ctx.shard is not None:
            return super().attend(q, k, v, x=x, ctx=ctx)
        if ctx.q_start:
            return AttentionResult(self._of_last_token(q, k, v, ctx.documents))
        if ctx.documents is None:
            out = self._fused(q, k, v)
        else:
            samples = [self._by_document(*qkv, ctx.documents[b]) for b, qkv in enumerate(zip(q, k, v, strict=True))]
            out = torch.stack(samples)
        return AttentionResult(out, stats={"density": torch.ones((), device=q.device)})

    def key_expiry(self, until: int, documents: Tensor | None = None) -> KeyExpiry | None:
        return None if self.config.pattern is None else super().key_expiry(until, documents)

    def row_costs(self, length: int, unit: int) -> list[float]:
        if self.config.pattern is not None:
            return super().row_costs(length, unit)
        starts = range(0, length, unit)  # in closed form, because the layout has an entry per pair of blocks
        if not self.shape.causal:
            return [float(min(unit, length - start)) for start in starts]
        return [float(min(unit, length - start) * (start + unit / 2)) for start in starts]

    def pattern_at(self, num_keys: int) -> Pattern:
        return self.config.pattern or LocalWindow(num_keys)  # a window over everything

    def _of_last_token(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """Decoding: one query, which reads every key of its document."""
        own = None if documents is None else (documents == documents[:, -1:])[:, None, None]
        grouped = self.shape.heads != self.shape.kv_heads
        return scaled_dot_product_attention(q, k, v, attn_mask=own, enable_gqa=grouped)

    def _by_document(self, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, documents_N: Tensor) -> Tensor:
        lengths = torch.unique_consecutive(documents_N, return_counts=True)[1].tolist()
        parts = zip(*(x.unsqueeze(0).split(lengths, dim=2) for x in (q_HND, k_HND, v_HND)), strict=True)
        return torch.cat([self._fused(*part) for part in parts], dim=2)[0]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.shape.heads != self.shape.kv_heads
        return scaled_dot_product_attention(q, k, v, is_causal=self.shape.causal, enable_gqa=grouped)


def refuse_unfit(pattern: Pattern, shape: AttentionShape, block: int) -> None:
    """Raises the pattern's ValueError for a shape that it cannot serve: at construction, not in the middle of a run."""
    if shape.context is None:
        return  # its answer may depend on the length
    last = -(-shape.context // block) - 1
    pattern.layout(
        shape.context,
        block=block,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        causal=shape.causal,
        rows=range(last, last + 1),
    )
