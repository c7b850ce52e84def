"""DSA, DeepSeek sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): a small indexer picks what is read.

The lightning indexer (indexer.py) scores all past tokens; the top_k best are read under one softmax, the same for all
heads. The choice has no gradient. The indexer imitates the attention instead (indexer_loss.py), in two stages:
attention is dense at first (`dense_steps`) and only the indexer trains (trainer.selector_only_steps), then everything
trains under sparse attention, the indexer still by its own loss alone, over what is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.pooling.block_means import gather_block_means
from lightsparse.attention.selection.dense_warning import warn_if_dense
from lightsparse.attention.selection.indexer import Index, Indexer
from lightsparse.attention.selection.indexer_loss import IndexerResult, Keys, choose, choose_and_learn, learn_from_dense
from lightsparse.attention.selection.kept_mass import kept_mass, queries_at, sampled_queries
from lightsparse.attention.selection.row_parts import block_ends, row_parts, single_rows
from lightsparse.attention.selection.stages import StagedAttention, StagedConfig
from lightsparse.attention.sharded_call import sequence_length, sharded_attention
from lightsparse.context_parallel.shard import sum_over
from lightsparse.kernels import Dropout, chunk_sizes
from lightsparse.patterns import BlockLayout, ElementMask, interval_mask

_TABLE = 1 << 24  # entries of the table in memory at once; more are worked on in parts, chosen again for the backward
_WIDE_TABLE = 1 << 26  # where chunks are wide
_UNIT = 16  # tokens that ranks do not cut; the choice of the last of them is reported


@dataclass(frozen=True)
class DsaConfig(StagedConfig):
    top_k: int = 512  # tokens that a query reads
    index_heads: int = 4  # of the indexer
    index_dim: int = 32  # width of an index head and of the one index key, even
    kl_weight: float = 1.0  # of the indexer's loss

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "index_heads", "index_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; it must be at least 1")
        if self.index_dim % 2:
            raise ValueError(f"attention.index_dim is {self.index_dim}; pairs of it are rotated, so it must be even")
        if not self.kl_weight > 0:
            raise ValueError(
                f"attention.kl_weight is {self.kl_weight}; nothing else trains the indexer, so it must be above 0"
            )
        if self.density is not None:
            raise ValueError(
                f"attention.density is {self.density}; a query reads top_k tokens whatever the context: set "
                "attention.top_k, or use attention=adaptive"
            )

    def small(self) -> Self:
        return replace(self, top_k=24, index_heads=2, index_dim=8)

    def full(self) -> Self:
        return replace(self, top_k=1 << 24)


class TokenSelection(NamedTuple):
    layout: BlockLayout


class DsaAttention(StagedAttention):
    """Each token reads the top_k tokens of its document up to itself that the indexer scores highest.

    Equal scores go to the earlier token: zeros are common, as every index head may find nothing. Nothing is forced in,
    not even the token itself.
    Ranks that share a sequence gather the index keys, and for the loss the keys, too; of keys and values they exchange
    only what is chosen.

    Stats: density; kept_mass, the share of dense attention's weight on what is chosen, or would be in the dense stage,
    on a few sampled queries; selection_kl, the indexer's loss in nats per query; uniform_kl, the same for equal weights
    in its place. `choice` is the table's row of every 16th token, so that it stays small.
    """

    Config = DsaConfig
    supports_bidirectional = False
    selects_from_input = True
    logged = ("kept_mass", "selection_kl", "uniform_kl")
    context_parallel = ("sparse", "gather")

    def __init__(self, config: DsaConfig, shape: AttentionShape):
        super().__init__(config, shape, block=_UNIT)
        self.options = config  # `config` under its own type
        self.indexer = Indexer(shape.embed_dim, config.index_heads, config.index_dim)
        warn_if_dense("attention.top_k", config.top_k, shape.context)

    def split_granularity(self) -> int:
        return _UNIT

    def row_costs(self, length: int, unit: int) -> list[float]:
        """Products of attention and indexer for the queries of each unit, without documents."""
        read = self.shape.heads * self.shape.head_dim * 2
        scored = self.options.index_heads * self.options.index_dim
        return [
            min(unit, length - start) * (read * min(start + unit / 2, self.options.top_k) + scored * (start + unit / 2))
            for start in range(0, length, unit)
        ]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        index = self._index(x, ctx)
        if ctx.states is not None:
            ctx.states[self.shape.layer]["index_keys"] = index.keys.detach()
        keys = self._keys(q, k, ctx) if torch.is_grad_enabled() and not ctx.q_start else None
        if self.dense_now:
            result, indexed = self.dense(q, k, v, x=x, ctx=ctx), None
            if keys is not None:
                indexed = learn_from_dense(index, self._mask(slice(0, q.shape[2]), k, ctx), keys)
        else:
            result, indexed = self._attend(q, k, v, index, keys, ctx)
        if not ctx.q_start:
            result.stats["kept_mass"] = self._kept_mass(q, k, index, ctx)
        if indexed is None:
            return result
        sums = torch.stack([indexed.divergence, indexed.uniform])
        if ctx.shard is not None:
            sums = sum_over(sums, ctx.shard)
        loss, uniform = sums / (q.shape[0] * sequence_length(k, ctx))
        result.stats |= {"selection_kl": loss.detach().float(), "uniform_kl": uniform.detach().float()}
        return replace(result, aux_loss=self.options.kl_weight * loss)

    def select(self, q: Tensor, k: Tensor, x: Tensor, ctx: SequenceContext) -> TokenSelection:
        """What attend reads in the sparse stage, for pictures: the table of all queries at once."""
        mask = self._mask(slice(0, q.shape[2]), k, ctx)
        return TokenSelection(single_rows(choose(self._index(x, ctx), mask, self.options.top_k), mask))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, index: Index, keys: Keys | None, ctx: SequenceContext
    ) -> tuple[AttentionResult, IndexerResult | None]:
        """The sparse stage; `keys` are there where the indexer learns."""
        dropout = self.dropout(q, ctx)
        per_query = len(q) * min(self.options.top_k, sequence_length(k, ctx))
        entries = chunk_sizes.at_once(q.device, _TABLE, _WIDE_TABLE)
        done, parts = [], row_parts(q.shape[2], per_query, _UNIT, entries, ctx)
        for part in parts:
            mask = self._mask(part, k, ctx)
            of_part = Index(index.q[:, part], index.weight[:, part], index.keys[:, : mask.num_keys])
            if keys is None:
                indexed = IndexerResult(choose(of_part, mask, self.options.top_k), *index.q.new_zeros(3))
            else:
                indexed = choose_and_learn(of_part, mask, self.options.top_k, keys.part(part, mask.num_keys))
            layout = single_rows(indexed.table, mask)
            read = k.shape[2] if ctx.shard is not None else mask.num_keys
            arguments = (q[:, :, part], k[:, :, :read], v[:, :, :read], of_part, mask, ctx, dropout)
            if torch.is_grad_enabled() and len(parts) > 1:
                once = [layout]
                out = checkpoint(self._read, once, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out = self._read([layout], *arguments)
            tokens = mask.q_pos[0]
            ends = block_ends(tokens, ctx.q_start + part.start, _UNIT, sequence_length(k, ctx), ctx)
            done.append((out, *layout.areas(), layout.kv_indices[:, :, ends], *indexed[1:]))
        out, computed, dense, choice, divergence, uniform, rows = zip(*done, strict=True)
        whole = out[0] if len(out) == 1 else torch.cat(out, 2)
        if ctx.q_start:
            return AttentionResult(whole), None
        area, of_dense = torch.stack(computed).sum(0), torch.stack(dense).sum(0)
        if ctx.shard is not None:
            area, of_dense = sum_over(area, ctx.shard), sum_over(of_dense, ctx.shard)
        stats = {"density": (area / of_dense[:, None]).mean().float()}
        indexed_all = IndexerResult(choice[0], *(torch.stack(of).sum() for of in (divergence, uniform, rows)))
        return AttentionResult(whole, stats=stats, choice=torch.cat(choice, 2)), None if keys is None else indexed_all

    def _read(
        self,
        once: list[BlockLayout],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Index,
        mask: ElementMask,
        ctx: SequenceContext,
        dropout: Dropout | None,
    ) -> Tensor:
        """Attention of some queries. once: what they chose, for the forward pass; the backward chooses it again."""
        layout = once.pop() if once else single_rows(choose(index, mask, self.options.top_k), mask)
        return sharded_attention(q, k, v, layout, ctx, dropout=dropout)

    def _mask(self, part: slice, k: Tensor, ctx: SequenceContext) -> ElementMask:
        """Of some of the queries here, and the tokens up to the last one; with a shard, all tokens of the sequence."""
        if ctx.shard is None:
            n = ctx.q_start + part.stop
            tokens = torch.arange(ctx.q_start + part.start, n, device=k.device)
        else:
            n, tokens = sequence_length(k, ctx), ctx.shard.tokens.to(k.device)[part]
        documents = None if ctx.documents is None else ctx.documents[:, :n]
        return interval_mask(n, documents=documents, device=k.device).of_queries(tokens)

    def _index(self, x: Tensor, ctx: SequenceContext) -> Index:
        """Of the queries here, with the keys of the whole sequence up to now."""
        index = self.indexer(x, ctx)
        if ctx.shard is not None:
            return index._replace(keys=gather_block_means(index.keys[:, None], ctx.shard, 1)[:, 0])
        if not ctx.q_start:
            return index
        earlier = (ctx.states or {}).get(self.shape.layer, {}).get("index_keys")
        if earlier is None or earlier.shape[1] != ctx.q_start:
            raise ValueError(
                f"ctx.q_start is {ctx.q_start} but ctx.states holds no index keys of {ctx.q_start} tokens for "
                f"layer {self.shape.layer}; decode with the states of the passes that read them, one KVCache per layer"
            )
        return index._replace(keys=torch.cat([earlier, index.keys], 1))

    @torch.compiler.disable
    @torch.no_grad()
    def _keys(self, q: Tensor, k: Tensor, ctx: SequenceContext) -> Keys:
        """What the indexer learns from."""
        return Keys(q, k if ctx.shard is None else gather_block_means(k, ctx.shard, 1))

    @torch.compiler.disable
    @torch.no_grad()
    def _kept_mass(self, q: Tensor, k: Tensor, index: Index, ctx: SequenceContext) -> Tensor:
        at = sampled_queries(sequence_length(k, ctx), k.device)
        index_q = queries_at(index.q.transpose(1, 2), at, ctx).transpose(1, 2)
        weight = queries_at(index.weight.mT[..., None], at, ctx)[..., 0].mT
        mask = interval_mask(index.keys.shape[1], documents=ctx.documents, device=k.device).of_queries(at)
        table = choose(Index(index_q, weight, index.keys), mask, self.options.top_k)
        return kept_mass(queries_at(q, at, ctx), k, table[:, None].expand(-1, q.shape[1], -1, -1), at, 1, ctx)
