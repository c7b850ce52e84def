"""Attention over a pattern that is known before its input: builds the layout once and hands it to the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.attention.core import AttentionCore, AttentionResult, SequenceContext
from lightsparse.attention.over_ranks import attention, own_rows, sequence_length
from lightsparse.patterns import BlockLayout, LayoutKey, Pattern, PersistentPatternCache

LAYOUTS = PersistentPatternCache()  # of the whole process: layers, steps and evaluations share it


class FixedPatternAttention(AttentionCore):
    """Base of the variants whose blocks do not depend on the data. Subclasses set `block` and say `pattern_at`."""

    block: int  # tokens
    context_parallel: tuple[str, ...] = ("sparse", "ring", "gather")

    def pattern_at(self, num_keys: int) -> Pattern:
        """The pattern over a sequence of `num_keys` tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern_at()")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        layout = self.layout(sequence_length(k, ctx), ctx, q.device)
        dropout = ctx.dropout(
            self.config.dropout, layer=self.shape.layer, training=self.training, batch=len(q), device=q.device
        )
        out, _ = attention(q, k, v, own_rows(layout, ctx), ctx, ring=True, dropout=dropout)
        return AttentionResult(out, stats={"density": torch.tensor(layout.density())})

    def shard_unit(self) -> int:
        return self.block

    def row_loads(self, length: int, unit: int) -> list[float]:
        """Query–key area of the computed tiles of each unit's rows, without documents."""
        ctx = SequenceContext(torch.arange(length)[None])
        rows = self.layout(length, ctx, torch.device("cpu")).row_areas()
        return [float(of_unit.sum()) for of_unit in rows.split(unit // self.block)]

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
