"""Compressed sparse attention, CSA (DeepSeek-V4, section 2.3.1): a window, and the best compressed entries per query.

Every `stride` tokens become one entry, pooled from 2 · stride tokens (csa_compress.py, eq. 9–12). A lightning indexer
with compressed keys of its own (eq. 13–17) chooses top_k of the entries that end at or before the query, for all heads
alike; these, a near window and a learned sink share one softmax. How this differs from V4's layer as a
whole: compressed.py. The indexer learns from the attention as DSA's does (indexer_loss.py). V4 alternates CSA with HCA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.pooling.compressed import (
    CompressedAttention,
    CompressedConfig,
    Entries,
    Far,
    beside,
    entry_mask,
    tokens_of,
)
from lightsparse.attention.pooling.csa_compress import Compressor, compressed, entry_positions
from lightsparse.attention.selection.dense_warning import warn_if_dense
from lightsparse.attention.selection.indexer import STD, Index, IndexQueries, as_read
from lightsparse.attention.selection.indexer_loss import IndexerResult, Keys, choose, choose_and_learn, learn_from_dense
from lightsparse.attention.selection.row_parts import row_parts, single_rows
from lightsparse.attention.selection.stages import StagedConfig
from lightsparse.attention.sharded_call import sequence_length
from lightsparse.context_parallel.shard import sum_over
from lightsparse.kernels import Dropout, block_sparse_attention_with_lse, chunk_sizes
from lightsparse.patterns import BlockLayout

_TABLE = 1 << 22  # entries in memory at once; a longer sequence is worked on in parts, chosen again for the backward
_WIDE_TABLE = 1 << 26  # where chunks are wide


@dataclass(frozen=True)
class CsaConfig(CompressedConfig, StagedConfig):
    top_k: int = 128  # compressed entries that a query reads at most
    index_heads: int = 4  # heads of the indexer
    index_dim: int = 32  # width of one
    index_weight: float = 1.0  # of the indexer's loss; only the indexer learns from it
    dense_steps: int = 0  # optimizer steps at the start in which a query reads every entry; −1 = all of them
    dense_from: int | None = None  # finished optimizer steps from which on it does so again; null = never

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, what in (("top_k", "entries"), ("index_heads", "heads")):
            if getattr(self, name) < 1:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; it counts {what} and must be at least 1")
        if self.index_dim < 4 or self.index_dim % 2:
            raise ValueError(
                f"attention.index_dim is {self.index_dim}; it is turned in pairs and must be even and at least 4"
            )
        if not 0.0 < self.index_weight < math.inf:
            raise ValueError(
                f"attention.index_weight is {self.index_weight}; nothing else trains the indexer, it must be above 0"
            )

    def small(self) -> Self:
        return replace(self, window=21, block=16, top_k=5, index_heads=2, index_dim=8)


class CompressedIndexer(IndexQueries):
    """x → index queries and weights of its tokens, and keys from a compressor of its own, pooled as the entries are.

    V4's published code has no training of the indexer: it learns here as V3.2's does (indexer_loss.py).
    """

    def __init__(self, embed_dim: int, heads: int, width: int, stride: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(embed_dim, heads * width, bias=False)
        self.weight = nn.Linear(embed_dim, heads, bias=False)
        for linear in (self.query, self.weight):
            nn.init.normal_(linear.weight, std=STD)
        self.compressor = Compressor(embed_dim, 1, width, stride, overlap=True)

    def forward(self, x: Tensor, ctx: SequenceContext, state: dict[str, Tensor]) -> Index:
        """x [B, R, E] at ctx.positions → Index with the keys of all entries of the sequence so far.

        state  as in `compressed`
        """
        with torch.autocast(x.device.type, enabled=False):
            x = as_read(x)
            keys = compressed(self.compressor, x, ctx, state, "index")
            if ctx.rotary is not None:
                keys = ctx.rotary(keys, entry_positions(keys.shape[2], self.compressor.stride, ctx, keys.device))
            return Index(*self.of_queries(x, ctx), keys[:, 0])


class EntrySelection(NamedTuple):
    layout: BlockLayout


class CsaAttention(CompressedAttention):
    """Each token reads the `window` tokens up to itself and the top_k entries that the indexer scores highest.

    In the dense stage (dense_steps) a query reads all entries, and the indexer learns over all of them.

    aux_loss: index_weight × KL from the attention's weights on the entries read to the softmax of the index, mean
    over the queries that read any.
    Stats: density; index_kl, that mean in nats. `choice` is the table's row of each block's last token.
    """

    Config = CsaConfig
    selects_from_input = True
    overlap = True
    logged = ("index_kl",)

    def __init__(self, config: CsaConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.csa = config  # `config` under its own type
        self.indexer = CompressedIndexer(shape.embed_dim, config.index_heads, config.index_dim, config.stride)
        self.dense_now = config.is_dense(0)
        warn_if_dense("attention.top_k × attention.stride", config.top_k * config.stride, shape.context)

    def selector_parameters(self) -> list[nn.Parameter]:
        return list(self.indexer.parameters())

    def set_step(self, step: int, max_steps: int) -> None:
        self.dense_now = self.csa.is_dense(step)

    def entries_read(self, visible: Tensor) -> Tensor:
        return visible.clamp(max=self.csa.top_k)

    def without_entries(self, x: Tensor, ctx: SequenceContext, state: dict[str, Tensor]) -> dict[str, Tensor]:
        self.indexer(x, ctx, state)  # decoding keeps its tokens, too
        return {"index_kl": x.new_zeros((), dtype=torch.float32)}

    def select(self, q: Tensor, k: Tensor, x: Tensor, ctx: SequenceContext) -> EntrySelection:
        """What attend reads, for pictures: tokens and, behind them, entries, a row per query and a key per block.

        The tokens are those of the window's tiles; k is not used. The table of all queries at once.
        """
        n, tokens = sequence_length(k, ctx), tokens_of(q, ctx)
        window = self.window_layout(n, ctx, q.device)
        tiles = window.per_token(0, n)
        table = tiles.kv_indices[..., None] * self.block + torch.arange(self.block, device=q.device)
        inside = (tiles.kv_indices >= 0)[..., None] & (table < n)
        table = torch.where(inside, table, -1).flatten(-2).to(torch.int32)
        near = replace(tiles, kv_indices=table, kv_block=1)
        return EntrySelection(beside(near, self._layout(self.indexer(x, ctx, {}), tokens, ctx)))

    @torch.compiler.disable  # the number of parts depends on values
    def far(
        self, q: Tensor, x: Tensor, near_lse: Tensor, entries: Entries, ctx: SequenceContext, dropout: Dropout | None
    ) -> tuple[Far, AttentionResult]:
        index, tokens = self.indexer(x, ctx, self._state(ctx)), tokens_of(q, ctx)
        keys = None
        if torch.is_grad_enabled() and not ctx.q_start:
            keys = self._keys(q, near_lse, entries)
        per_query = len(q) * min(self.csa.top_k, entries.count)
        at_once = chunk_sizes.at_once(q.device, _TABLE, _WIDE_TABLE)
        done, parts = [], row_parts(q.shape[2], per_query, self.block, at_once, ctx)
        for part in parts:
            of_part = Index(index.q[:, part], index.weight[:, part], index.keys)
            to = None if keys is None else keys.part(part, entries.count)
            layout, indexed = self._indexed(of_part, to, tokens[part], ctx)
            arguments = (q[:, :, part], entries, of_part, tokens[part], ctx, dropout)
            if torch.is_grad_enabled() and len(parts) > 1:
                once = [layout]
                out, lse = checkpoint(self._read, once, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out, lse = self._read([layout], *arguments)
            ends = tokens[part] % self.block == self.block - 1
            ends[-1] = True
            choice = indexed.table[:, None] if self.dense_now else indexed.table[:, None, ends]
            done.append((out, lse, layout.areas()[0].mean(1), choice, *indexed[1:]))
        outs, lses, area, choices, divergence, _, rows = zip(*done, strict=True)
        far = Far(torch.cat(outs, 2), torch.cat(lses, 2), torch.stack(area).sum(0))
        if ctx.q_start:
            return far, AttentionResult(far.out)
        table = None if self.dense_now else torch.cat(choices, 2)
        if keys is None:
            return far, AttentionResult(far.out, choice=table)
        sums = torch.stack([torch.stack(divergence).sum(), torch.stack(rows).sum()])
        if ctx.shard is not None:
            sums = sum_over(sums, ctx.shard)
        mean = sums[0] / sums[1].detach().clamp(min=1)
        loss = self.csa.index_weight * mean
        return far, AttentionResult(far.out, loss, {"index_kl": mean.detach().float()}, table)

    @torch.compiler.disable
    @torch.no_grad()
    def _keys(self, q: Tensor, near_lse: Tensor, entries: Entries) -> Keys:
        """What the indexer learns from; beside entries a head reads its window and its sink."""
        assert self.sink is not None
        return Keys(q, entries.keys, torch.logaddexp(near_lse, self.sink.to(near_lse.dtype)[:, None]))

    def _indexed(
        self, index: Index, keys: Keys | None, tokens: Tensor, ctx: SequenceContext
    ) -> tuple[BlockLayout, IndexerResult]:
        """What queries at `tokens` read, and what the indexer learns from it where `keys` are there."""
        mask = entry_mask(index.keys.shape[1], self.stride, tokens, ctx)
        nothing = IndexerResult(tokens.new_empty(len(index.q), 0, 0, dtype=torch.int32), *index.q.new_zeros(3))
        if self.dense_now:
            layout = self.all_entries(index.keys.shape[1], tokens, 1 if ctx.q_start else self.block, ctx)
            return layout, nothing if keys is None else learn_from_dense(index, mask, keys)
        if keys is None:
            indexed = nothing._replace(table=choose(index, mask, self.csa.top_k))
        else:
            indexed = choose_and_learn(index, mask, self.csa.top_k, keys)
        return single_rows(indexed.table, mask), indexed

    def _read(
        self,
        once: list[BlockLayout],
        q: Tensor,
        entries: Entries,
        index: Index,
        tokens: Tensor,
        ctx: SequenceContext,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of some queries, and its lse. once: what they read, for the forward pass; the backward finds it
        again."""
        layout = once.pop() if once else self._indexed(index, None, tokens, ctx)[0]
        return block_sparse_attention_with_lse(q, entries.keys, entries.values, layout, dropout=dropout)

    def _layout(self, index: Index, tokens: Tensor, ctx: SequenceContext) -> BlockLayout:
        """What queries at `tokens` choose."""
        mask = entry_mask(index.keys.shape[1], self.stride, tokens, ctx)
        return single_rows(choose(index, mask, self.csa.top_k), mask)
