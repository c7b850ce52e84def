"""Attention over a pattern that is known before its input: builds the layout once and hands it to the kernels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightsparse.attention.core import AttentionCore, AttentionResult, SequenceContext
from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import BlockLayout, Pattern


class FixedPatternAttention(AttentionCore):
    """Base of the variants whose blocks do not depend on the data. Subclasses set `block` and say `pattern_at`."""

    block: int  # tokens

    def pattern_at(self, num_keys: int) -> Pattern:
        """The pattern over a sequence of `num_keys` tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern_at()")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        layout = self.layout(k.shape[2], ctx, q.device)
        dropout = ctx.dropout(
            self.config.dropout, layer=self.shape.layer, training=self.training, batch=len(q), device=q.device
        )
        out = block_sparse_attention(q, k, v, layout, dropout=dropout)
        assert isinstance(out, Tensor)
        return AttentionResult(out, stats={"density": torch.tensor(layout.density())})

    def layout(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> BlockLayout:
        """The layout of queries ctx.q_start … num_keys − 1. Layers of the same pattern share it."""
        pattern, rows = self.pattern_at(num_keys), range(ctx.q_start // self.block, -(-num_keys // self.block))
        heads, kv_heads, causal = self.shape.heads, self.shape.kv_heads, self.shape.causal
        key = (type(self), pattern, self.block, heads, kv_heads, causal, num_keys, device, rows)
        if ctx.documents is None:
            whole = _layout_without_documents(*key)
        else:
            if key not in ctx.layouts:
                ctx.layouts[key] = _layout(*key, ctx.documents)
            whole = ctx.layouts[key]
        within = ctx.q_start % self.block
        return whole.per_token(within, whole.num_queries) if within else whole

    @staticmethod
    def finish(layout: BlockLayout, pattern: Pattern, documents: Tensor | None) -> BlockLayout:
        """What a variant adds to its pattern's layout, a token-exact window for example."""
        return layout


def _layout(
    variant: type[FixedPatternAttention],
    pattern: Pattern,
    block: int,
    heads: int,
    kv_heads: int,
    causal: bool,
    num_keys: int,
    device: torch.device,
    rows: range,
    documents: Tensor | None,
) -> BlockLayout:
    layout = pattern.layout(
        num_keys,
        block=block,
        heads=heads,
        kv_heads=kv_heads,
        causal=causal,
        device=device,
        rows=rows,
        documents=documents,
    )
    return variant.finish(layout, pattern, documents)


@lru_cache(maxsize=32)
def _layout_without_documents(variant, pattern, block, heads, kv_heads, causal, num_keys, device, rows) -> BlockLayout:
    return _layout(variant, pattern, block, heads, kv_heads, causal, num_keys, device, rows, None)
