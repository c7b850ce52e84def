"""MoBA, mixture of block attention (Lu et al. 2025, arXiv 2502.13189, section 2.2): every token picks its key blocks.

The score of query t for block J is s = ⟨q_t, mean(K_J)⟩ (eq. 6), per query head. Read are the top_k blocks by score
under one softmax (eq. 2–5), the own block always among them and causal inside, later ones never. Nothing is learned
beside q and k: the choice has no gradient and no loss of its own, so q and k learn through what is read.
The paper keeps full attention in some layers (section 3.2): model.layer_pattern=SSSD.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.guards import warn_if_dense
from lightsparse.attention.kept_mass import kept_mass, queries_at, sampled_queries
from lightsparse.attention.over_ranks import attention, sequence_length
from lightsparse.attention.summaries import block_documents, block_means, of_all_ranks
from lightsparse.attention.top_blocks import Documents, top_blocks
from lightsparse.kernels import Dropout
from lightsparse.parallel.shard import sum_over
from lightsparse.patterns import BlockLayout, interval_mask
from lightsparse.patterns.layout import no_dense_rows

_TABLE = (
    1 << 24
)  # entries of the tables held at once; a longer sequence is worked on in parts, chosen again for backward


@dataclass(frozen=True)
class MobaConfig(AttentionConfig):
    block: int = 512  # tokens per key block; the paper's for a context of 8k, 4096 for one of 1M
    top_k: int = 3  # blocks that a query reads, its own included; 12 for the 1M context

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

    def small(self) -> Self:
        return replace(self, block=16, top_k=3)

    def full(self) -> Self:
        return replace(self, top_k=1 << 24)


class Selection(NamedTuple):
    layout: BlockLayout


class _Part(NamedTuple):
    """Of some queries."""

    out: Tensor  # [B, H, R, D]
    computed: Tensor  # [B, H]: query–key area of the tiles read
    dense: Tensor  # [B|1]: and of dense attention's
    choice: Tensor  # int32 [B, H, rows, K]: what the last token of every block chose


class MobaAttention(AttentionCore):
    """Each token reads its own block and, of the blocks before it, the top_k − 1 whose mean key suits its query best.

    With documents a block's mean is over the tokens of its last token's document, and only blocks that hold tokens of
    the query's own document can be chosen; the own block always is. top_k = 1 reads the own block alone.
    Scores are fp32 with autocast off; equal ones go to the lower block.

    Stats: density; kept_mass, the share of dense attention's weight on what is read, on a few sampled queries.
    `choice` is the table's row of each block's last token, so that it stays small.
    """

    Config = MobaConfig
    reads_input = False
    supports_bidirectional = False
    chooses = True
    logged = ("kept_mass",)
    context_parallel = ("sparse", "gather")

    def __init__(self, config: MobaConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.options = config  # `config` under its own type
        warn_if_dense("attention.top_k × attention.block", config.top_k * config.block, shape.context)

    def shard_unit(self) -> int:
        return self.options.block

    def row_loads(self, length: int, unit: int) -> list[float]:
        """Keys that the queries of each unit read, summed, without documents."""
        block, top_k = self.options.block, self.options.top_k
        blocks = [min(start // block + 1, top_k) * block * block for start in range(0, length, block)]
        of_unit = max(unit // block, 1)
        return [float(sum(blocks[i : i + of_unit])) for i in range(0, len(blocks), of_unit)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        dropout = ctx.dropout(
            self.options.dropout, layer=self.shape.layer, training=self.training, batch=len(q), device=q.device
        )
        means, n = self._block_means(k, ctx), sequence_length(k, ctx)
        if ctx.states is not None:  # of complete blocks: they are final
            ctx.states[self.shape.layer]["block_means"] = means[:, :, : n // self.options.block]
        parts = []
        for start, stop in self._parts(q, n, ctx):
            keys = k.shape[2] if stop == q.shape[2] else ctx.q_start + stop
            given = (q[:, :, start:stop], k[:, :, :keys], v[:, :, :keys], means, ctx.q_start + start, n, ctx, dropout)
            if torch.is_grad_enabled() and stop - start < q.shape[2]:
                parts.append(checkpoint(self._attend, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._attend(*given))
        out, computed, dense, choice = zip(*parts, strict=True)
        whole = out[0] if len(out) == 1 else torch.cat(out, 2)
        if ctx.q_start:
            return AttentionResult(whole)
        area, of_dense = torch.stack(computed).sum(0), torch.stack(dense).sum(0)
        if ctx.shard is not None:
            area, of_dense = sum_over(area, ctx.shard), sum_over(of_dense, ctx.shard)
        at = sampled_queries(n, q.device)
        q_at = queries_at(q, at, ctx)
        stats = {
            "density": (area / of_dense[:, None]).mean().float(),
            "kept_mass": kept_mass(q_at, k, self.choose(q_at, means, at, ctx), at, self.options.block, ctx),
        }
        return AttentionResult(whole, stats=stats, choice=torch.cat(choice, 2))

    def _parts(self, q: Tensor, n: int, ctx: SequenceContext) -> list[tuple[int, int]]:
        """Queries whose table is held at once; ranks that share a sequence take all of theirs, in step."""
        per_query = q.shape[0] * q.shape[1] * min(self.options.top_k, -(-n // self.options.block))
        at_once = max(_TABLE // per_query // self.options.block, 1) * self.options.block
        if ctx.shard is not None or q.shape[2] <= at_once:
            return [(0, q.shape[2])]
        return [(start, min(start + at_once, q.shape[2])) for start in range(0, q.shape[2], at_once)]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        means: Tensor,
        first: int,
        length: int,
        ctx: SequenceContext,
        dropout: Dropout | None,
    ) -> _Part:
        """Queries `first` … of a sequence of `length` (with a shard: this rank's) over keys up to the last of them."""
        layout, tokens = self._layout(q, means, first, length, ctx)
        out, _ = attention(q, k, v, layout, ctx, dropout=dropout)
        ends = (tokens % self.options.block == self.options.block - 1) | (tokens == length - 1)
        return _Part(out, *layout.areas(), layout.kv_indices[:, :, ends])

    def _layout(
        self, q: Tensor, means: Tensor, first: int, length: int, ctx: SequenceContext
    ) -> tuple[BlockLayout, Tensor]:
        """What these queries read, and their places in the sequence."""
        if ctx.shard is None:
            n, tokens = first + q.shape[2], torch.arange(first, first + q.shape[2], device=q.device)
        else:
            n, tokens = length, ctx.shard.tokens.to(q.device)
        documents = None if ctx.documents is None else ctx.documents[:, :n]
        mask = interval_mask(n, documents=documents, device=q.device).of_queries(tokens)
        table = self.choose(q, means, tokens, ctx)
        return BlockLayout(table, 1, self.options.block, mask, no_dense_rows(q.device)), tokens

    def select(self, q: Tensor, k: Tensor, x: Tensor, ctx: SequenceContext) -> Selection:
        """What forward reads, for pictures; x plays no part. The table of all queries at once."""
        return Selection(self._layout(q, self._block_means(k, ctx), ctx.q_start, sequence_length(k, ctx), ctx)[0])

    @torch.compiler.disable  # it goes by values
    @torch.no_grad()
    def choose(self, q: Tensor, means: Tensor, tokens: Tensor, ctx: SequenceContext) -> Tensor:
        """The table of some queries [B, H, R, D] at `tokens` [R], ascending: int32 [B, H, R, K].

        means  [B, Hkv, blocks, D], of all blocks of the sequence
        """
        block, top_k, documents = self.options.block, self.options.top_k, None
        if ctx.documents is not None:  # a block before the own one holds tokens of the document iff its last token does
            documents = Documents(ctx.documents[:, tokens], block_documents(ctx.documents, block, "last"))
        with torch.autocast(q.device.type, enabled=False):
            return top_blocks(q, means, tokens // block, top_k, min(top_k, means.shape[2]), documents)

    @torch.compiler.disable
    @torch.no_grad()
    def _block_means(self, k: Tensor, ctx: SequenceContext) -> Tensor:
        """Mean key of each block of the sequence, at least fp32: [B, Hkv, blocks, D]."""
        block, documents = self.options.block, ctx.documents
        with torch.autocast(k.device.type, enabled=False):
            if ctx.shard is not None:
                documents = None if documents is None else ctx.shard.take(documents)
                return of_all_ranks(block_means(k, block, documents, "last"), ctx.shard, block)
            held = None
            if ctx.q_start and ctx.states is not None:
                held = ctx.states[self.shape.layer].get("block_means")
            done = 0 if held is None else held.shape[2] * block
            new = block_means(
                k[:, :, done:], block, None if documents is None else documents[:, done : k.shape[2]], "last"
            )
            return new if held is None else torch.cat([held, new], 2)
