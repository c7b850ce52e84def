"""Base of the variants in which every token reads a few key blocks of its own choice, by a score per block.

A subclass says which product is the score (`scored`) and, if it learns to choose, by which loss (`learned`).
Shapes: B batch, H query heads, S heads that choose (all query heads, or one per key/value head), n queries of a pass,
C key blocks, F width of what is multiplied, K entries of a query's table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightsparse.attention.core import AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.pooling.block_means import block_documents
from lightsparse.attention.selection.dense_warning import warn_if_dense
from lightsparse.attention.selection.kept_mass import kept_mass, queries_at, sampled_queries
from lightsparse.attention.selection.row_parts import BlockSelection, attend_in_parts, row_layout
from lightsparse.attention.selection.stages import StagedAttention, StagedConfig
from lightsparse.attention.selection.top_blocks import Documents, Rule, top_blocks
from lightsparse.attention.sharded_call import sequence_length
from lightsparse.context_parallel.shard import sum_over
from lightsparse.patterns import BlockLayout


@dataclass(frozen=True)
class TokenBlocksConfig(StagedConfig):
    block: int = 64  # tokens per key block
    top_k: int = 8  # blocks that a query reads, its own included

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"attention.block is {self.block}; it counts tokens and must be at least 1")
        if self.top_k < 1:
            raise ValueError(
                f"attention.top_k is {self.top_k}; it counts blocks, the own one included, and must be at least 1"
            )
        if self.density is not None:
            raise ValueError(
                f"attention.density is {self.density}; a query reads top_k blocks whatever the context: set "
                "attention.top_k and attention.block, or use attention=adaptive"
            )


class Scored(NamedTuple):
    """The score of a query for a block is the product of the two. Without gradient.

    Where ranks share the sequence, `queries` are this rank's and `blocks` still all of them (see gather_block_means).
    """

    queries: Tensor  # [B, S, n, F], of this pass
    blocks: Tensor  # [B, Hkv, C, F], of the whole sequence


class TokenBlocksAttention(StagedAttention):
    """Each token reads its own block and, of the blocks before it, the top_k − 1 of the highest score.

    With documents only blocks whose last token is of the query's own document can be chosen; the own block always is.
    top_k = 1 reads the own block alone. Scores are fp32 with autocast off; equal ones go to the lower block.

    Stats: density; kept_mass, the share of dense attention's weight on what is (or in a dense stage would be) read, on
    a few sampled queries. `choice` is the table's row of each block's last token, so that it stays small.
    """

    supports_bidirectional = False
    needs_hidden_states = False
    selects_from_input = True
    logged: ClassVar[tuple[str, ...]] = ("kept_mass",)
    context_parallel = ("sparse", "gather")

    def __init__(self, config: TokenBlocksConfig, shape: AttentionShape):
        super().__init__(config, shape, config.block)
        self.options = config  # `config` under its own type
        warn_if_dense("attention.top_k × attention.block", config.top_k * config.block, shape.context)

    def scored(self, q: Tensor, k: Tensor, ctx: SequenceContext) -> Scored:
        """What the choice is made by, from q [B, H, n, D] and k [B, Hkv, Nkv, D]; changes no state, not even ctx."""
        raise NotImplementedError(f"{type(self).__name__} has no scored()")

    def keep(self, scored: Scored, length: int, state: dict[str, Tensor]) -> None:
        """Put into the layer's decoding state what spares the next pass work, `length` tokens having been read."""

    def learned(self, q: Tensor, k: Tensor, ctx: SequenceContext) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The auxiliary loss, if any, and what it reports."""
        return None, {}

    def rule(self) -> Rule:
        """Further constraints on the choice."""
        return Rule()

    def split_granularity(self) -> int:
        return self.options.block

    def row_costs(self, length: int, unit: int) -> list[float]:
        """Keys that the queries of each unit read, summed, without documents."""
        block, top_k = self.options.block, self.options.top_k
        blocks = [min(start // block + 1, top_k) * block * block for start in range(0, length, block)]
        of_unit = max(unit // block, 1)
        return [float(sum(blocks[i : i + of_unit])) for i in range(0, len(blocks), of_unit)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        if self.dense_now and ctx.states is not None:
            return self.dense(q, k, v, x=x, ctx=ctx)
        scored, n = self.scored(q, k, ctx), sequence_length(k, ctx)
        if ctx.states is not None:
            self.keep(scored, n, ctx.states[self.shape.layer])
        if self.dense_now:
            whole = self.dense(q, k, v, x=x, ctx=ctx)
            out, density, choice = whole.out, whole.stats.get("density"), None
        else:
            out, density, choice = self._sparse(q, k, v, scored, n, ctx)
        if ctx.q_start or density is None:
            return AttentionResult(out)
        if choice is None:
            ends = torch.arange(self.options.block, n + self.options.block, self.options.block, device=q.device) - 1
            choice = self._choice_at(scored, ends.clamp(max=n - 1), n, ctx)
        at = sampled_queries(n, q.device)
        table = self.choose(queries_at(scored.queries, at, ctx), scored.blocks, at, ctx)
        table = table.repeat_interleave(q.shape[1] // table.shape[1], 1)
        kept = kept_mass(queries_at(q, at, ctx), k, table, at, self.options.block, ctx)
        aux_loss, report = self.learned(q, k, ctx)
        return AttentionResult(out, aux_loss, {"density": density, "kept_mass": kept, **report}, choice)

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, scored: Scored, n: int, ctx: SequenceContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, density and choice."""
        block = self.options.block

        def layout_of(part: slice) -> tuple[BlockLayout, Tensor]:
            of_part = scored._replace(queries=scored.queries[:, :, part])
            return self._layout(of_part, ctx.q_start + part.start, n, ctx)

        dropout = self.dropout(q, ctx)
        entries = q.shape[0] * q.shape[1] * min(self.options.top_k, -(-n // block))
        whole = attend_in_parts(layout_of, q, k, v, entries, block, n, ctx, dropout)
        area, of_dense = whole.computed, whole.dense
        if ctx.shard is not None:
            area, of_dense = sum_over(area, ctx.shard), sum_over(of_dense, ctx.shard)
        return whole.out, (area / of_dense[:, None]).mean().float(), whole.choice

    def _layout(self, scored: Scored, first: int, length: int, ctx: SequenceContext) -> tuple[BlockLayout, Tensor]:
        """What these queries read, and their places in the sequence."""
        return row_layout(
            lambda tokens: self.choose(scored.queries, scored.blocks, tokens, ctx),
            scored.queries.shape[2],
            first,
            length,
            self.options.block,
            ctx,
        )

    @torch.compiler.disable  # depends on the places of this rank's tokens
    def _choice_at(self, scored: Scored, at: Tensor, n: int, ctx: SequenceContext) -> Tensor:
        """The choice of the queries at some places of the sequence, of those on this rank."""
        if ctx.shard is not None:
            tokens = ctx.shard.tokens.to(at.device)
            at = at[torch.isin(at, tokens)]
            return self.choose(scored.queries[:, :, torch.searchsorted(tokens, at)], scored.blocks, at, ctx)
        return self.choose(scored.queries[:, :, at], scored.blocks, at, ctx)

    def select(self, q: Tensor, k: Tensor, x: Tensor, ctx: SequenceContext) -> BlockSelection:
        """What attend reads outside of a dense stage, the table of all queries at once; x is not used."""
        return BlockSelection(self._layout(self.scored(q, k, ctx), ctx.q_start, sequence_length(k, ctx), ctx)[0])

    @torch.compiler.disable  # depends on values
    @torch.no_grad()
    def choose(self, queries: Tensor, blocks: Tensor, tokens: Tensor, ctx: SequenceContext) -> Tensor:
        """The table of some queries [B, S, R, F] at `tokens` [R], ascending: int32 [B, S, R, K].

        blocks  [B, Hkv, C, F], of all blocks of the sequence
        """
        block, top_k, documents = self.options.block, self.options.top_k, None
        if ctx.documents is not None:  # a block before the own one holds tokens of the document iff its last token does
            documents = Documents(ctx.documents[:, tokens], block_documents(ctx.documents, block, "last"))
        with torch.autocast(queries.device.type, enabled=False):
            return top_blocks(
                queries, blocks, tokens // block, top_k, min(top_k, blocks.shape[2]), documents, self.rule()
            )
