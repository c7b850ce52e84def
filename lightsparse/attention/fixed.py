"""Attention over a pattern that is known before its input: builds the layout once and hands it to the kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightsparse.attention.core import (
    AttentionConfig,
    AttentionCore,
    AttentionResult,
    AttentionShape,
    KeyExpiry,
    SequenceContext,
)
from lightsparse.attention.sharded_call import (
    own_rows,
    sequence_length,
    sharded_attention,
    sharded_attention_with_lse,
)
from lightsparse.patterns import BlockLayout, LayoutKey, Pattern, PersistentPatternCache
from lightsparse.patterns.parts import of_keys

LAYOUTS = PersistentPatternCache()  # of the whole process: layers, steps and evaluations share it
_ROWS = 1024  # rows of a pattern in memory at once


class FixedPatternAttention(AttentionCore):
    """Base of the variants whose blocks do not depend on the data. Subclasses set `block`, write `pattern_at`."""

    block: int  # tokens
    needs_hidden_states = False
    context_parallel: tuple[str, ...] = ("sparse", "ring", "gather")

    def __init__(self, config: AttentionConfig, shape: AttentionShape, *, learned_sink: bool = False):
        super().__init__(config, shape)
        # [H]: a logit per query head in the softmax's denominator (`with_sink`)
        self.sink = nn.Parameter(torch.zeros(shape.heads)) if learned_sink else None

    def pattern_at(self, num_keys: int) -> Pattern:
        """The pattern over a sequence of `num_keys` tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern_at()")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        length = sequence_length(k, ctx)
        layout = self.layout(length, ctx, q.device)
        dropout, rows = self.dropout(q, ctx), of_cached_keys(own_rows(layout, ctx), ctx)
        if self.sink is None:
            out = sharded_attention(q, k, v, rows, ctx, ring=True, dropout=dropout)
        else:
            out = with_sink(*sharded_attention_with_lse(q, k, v, rows, ctx, ring=True, dropout=dropout), self.sink)
        return AttentionResult(
            out, stats={} if ctx.q_start else {"density": torch.tensor(layout.density(), device=q.device)}
        )

    def split_granularity(self) -> int:
        return self.block

    def row_costs(self, length: int, unit: int) -> list[float]:
        """Query–key area of the computed tiles of each unit's rows, without documents."""
        ctx = SequenceContext(torch.arange(length)[None])
        rows = self.layout(length, ctx, torch.device("cpu")).row_areas()
        return [float(of_unit.sum()) for of_unit in rows.split(unit // self.block)]

    @torch.compiler.disable  # numbers in, a table out: nothing to compile, and data-dependent widths break the graph
    def layout(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> BlockLayout:
        """The layout of queries ctx.q_start … num_keys − 1 over all keys. Layers of the same pass share it."""
        if self.block < 1:
            raise ValueError(f"attention.block is {self.block}; it counts tokens and must be at least 1")
        shape, pattern = self.shape, self.pattern_at(num_keys)
        rows = range(ctx.q_start // self.block, -(-num_keys // self.block))
        key = LayoutKey(pattern, num_keys, self.block, shape.heads, shape.kv_heads, shape.causal, device, rows)
        if ctx.documents is None and ctx.q_start == 0:
            return LAYOUTS.layout(key, self.finish)
        of_pass = (key, self.finish)  # of this batch's documents, or of one decoding step: only this pass shares it
        if of_pass not in ctx.layouts:
            whole = self.finish(key.build(ctx.documents), pattern, ctx.documents)
            within = ctx.q_start % self.block
            ctx.layouts[of_pass] = whole.per_token(within, whole.num_queries) if within else whole
        return ctx.layouts[of_pass]

    def key_expiry(self, until: int, documents: Tensor | None = None) -> KeyExpiry | None:
        """From the rows of all blocks to come: O(until / block · K) time, and at most _ROWS rows in memory at once."""
        shape, block, pattern = self.shape, self.block, self.pattern_at(until)
        blocks = -(-until // block)
        last_row = torch.full((blocks,), -1)
        for start in range(0, blocks, _ROWS):
            rows = range(start, min(start + _ROWS, blocks))
            layout = pattern.layout(
                until, block=block, heads=shape.heads, kv_heads=shape.kv_heads, rows=rows, documents=documents
            )
            table = layout.kv_indices
            reader = torch.arange(rows.start, rows.stop)[:, None].expand_as(table)
            of_tokens = (table >= 0) & (table < blocks)  # what stands behind the tokens is not in the cache
            last_row.scatter_reduce_(0, table[of_tokens].long(), reader[of_tokens], "amax")
            if len(layout.dense_rows):
                dense = rows.start + int(layout.dense_rows.max())
                last_row[: dense + 1] = dense
        return KeyExpiry(until, block, last_row.tolist())

    @staticmethod
    def finish(layout: BlockLayout, pattern: Pattern, documents: Tensor | None) -> BlockLayout:
        """What a variant adds to its pattern's layout, a token-exact window for example."""
        return layout


@torch.compiler.disable
def of_cached_keys(layout: BlockLayout, ctx: SequenceContext) -> BlockLayout:
    """The layout over the keys still in the cache: those of ctx.cached_block_ids, and what stands behind the tokens.

    Layers of the same pass share it.
    """
    if ctx.cached_block_ids is None:
        return layout
    if layout not in ctx.layouts:
        behind = torch.arange(
            -(-layout.num_tokens // layout.kv_block), layout.num_kv_blocks, device=ctx.cached_block_ids.device
        )
        ctx.layouts[layout] = of_keys(layout, torch.cat([ctx.cached_block_ids, behind]))
    return ctx.layouts[layout]


def with_sink(out: Tensor, lse: Tensor, sink_H: Tensor) -> Tensor:
    """Attention as if its softmax had one more column, of logit sink[h] and value 0: out · σ(lse − sink).

    out [B, H, N, D], lse [B, H, N]; a row that reads nothing stays 0, and a sink of −∞ changes nothing.
    """
    share = torch.sigmoid(lse - sink_H.to(lse.dtype)[:, None])
    return out * share[..., None].to(out.dtype)
