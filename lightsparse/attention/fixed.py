"""Attention over a pattern that is known before its input: builds the layout once and hands it to the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.attention.core import AttentionCore, AttentionResult, SequenceContext
from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import BlockLayout, LayoutKey, Pattern, PersistentPatternCache

LAYOUTS = PersistentPatternCache()  # of the whole process: layers, steps and evaluations share it


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

    @torch.compiler.disable  # numbers in, a table out: nothing to compile, and data-dependent widths break the graph
    def layout(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> BlockLayout:
        """The layout of queries ctx.q_start … num_keys − 1. Layers of the same pattern share it."""
        shape, pattern = self.shape, self.pattern_at(num_keys)
        rows = range(ctx.q_start // self.block, -(-num_keys // self.block))
        key = LayoutKey(pattern, num_keys, self.block, shape.heads, shape.kv_heads, shape.causal, device, rows)
        if ctx.documents is None and ctx.q_start == 0:
            whole = LAYOUTS.layout(key, self.finish)
        else:  # of this batch's documents, or of one decoding step: only the layers of the pass share it
            of_pass = (key, self.finish)
            if of_pass not in ctx.layouts:
                ctx.layouts[of_pass] = self.finish(key.build(ctx.documents), pattern, ctx.documents)
            whole = ctx.layouts[of_pass]
        within = ctx.q_start % self.block
        return whole.per_token(within, whole.num_queries) if within else whole

    @staticmethod
    def finish(layout: BlockLayout, pattern: Pattern, documents: Tensor | None) -> BlockLayout:
        """What a variant adds to its pattern's layout, a token-exact window for example."""
        return layout
