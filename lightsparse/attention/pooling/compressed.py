"""Attention over a near window and compressed entries of the whole past, under one softmax with a learned sink.

The frame of DeepSeek-V4's CSA (csa.py: the best entries per query) and HCA (hca.py: all of them), after the code that
`transformers` carries as deepseek_v4. A core gets q, k and v from the model's layer; it differs from V4's layer in what
belongs to that layer:

- V4 has one key/value head whose vector is key and value at once, for tokens too. Here tokens bring the model's k and
  v, in any number of heads; an entry is, per key/value head, key and value at once, as in V4.
- V4 turns the last 64 of 512 dimensions, values included, and turns its output back. Here an entry's key is turned as
  the model turns its keys (model.rope), whole heads, and its value is not, so that the output needs no turn back.
- V4's norms of queries and keys (here model.qk_norm), its low-rank query and grouped output projections, the base of
  RoPE for long ranges and the hyper-connections belong to the model. The indexer's query comes from x, not from the
  low-rank query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.fixed import FixedPatternAttention, of_cached_keys, with_sink
from lightsparse.attention.pooling.csa_compress import Compressor, compressed, entry_documents, entry_positions
from lightsparse.attention.sharded_call import own_rows, sequence_length, sharded_attention_with_lse
from lightsparse.context_parallel.shard import sum_over
from lightsparse.kernels import Dropout
from lightsparse.patterns import BlockLayout, ElementMask, LocalWindow, Pattern, interval_mask
from lightsparse.patterns.grid import compact
from lightsparse.patterns.layout import no_dense_rows
from lightsparse.patterns.mask import ALWAYS
from lightsparse.utils.hashing import chain

_FAR = torch.tensor(1)  # keeps the dropout of entries apart from that of tokens


@dataclass(frozen=True)
class CompressedConfig(AttentionConfig):
    window: int = 128  # tokens that a query reads one by one, itself included
    stride: int = 4  # tokens per compressed entry
    block: int = 64  # tokens per tile of the computation; changes the speed and the density, never the result

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, what in (("window", "tokens"), ("stride", "tokens per entry"), ("block", "tokens")):
            if getattr(self, name) < 1:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; it counts {what} and must be at least 1")
        if self.density is not None:
            raise ValueError(
                f"attention.density is {self.density}; window and stride set it here: set attention.window and "
                "attention.stride, or use attention=hierarchical, which solves for a density"
            )

    def full(self) -> Self:
        raise NotImplementedError(f"{type(self).__name__} has no full budget: entries stand beside tokens")


@dataclass(frozen=True, eq=False)
class Entries:
    """All compressed entries of the sequence so far: keys and values [B, Hkv, S, D]."""

    keys: Tensor
    values: Tensor

    @property
    def count(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True, eq=False)
class Far:
    """What some queries get from entries.

    out, lse  [B, H, R, D] and [B, H, R]
    area      query–key pairs of the tiles computed, [B|1], as BlockLayout counts them
    """

    out: Tensor
    lse: Tensor
    area: Tensor


class CompressedAttention(FixedPatternAttention):
    """The window through the tiles of a layout, entries as a subclass says (`far`), merged by their log-sum-exps.

    One softmax over window, entries and sink: out = Σ exp(lse_i) · out_i / (Σ exp(lse_i) + exp(sink)). An entry's last
    token may stand in the window: V4 reads both.
    Several ranks: a window's keys come as for every fixed pattern; each rank makes the entries of its own strides,
    for which it takes one pooled part from the rank before, and gathers all entries.
    Decoding keeps the entries, the tokens of the unfinished stride, and k and v as long as the window reads them.
    """

    supports_bidirectional = False
    exact_at_full_budget = False
    needs_hidden_states = True
    overlap = False  # whether an entry also pools the stride before its own
    context_parallel = ("sparse", "gather")

    def __init__(self, config: CompressedConfig, shape: AttentionShape):
        super().__init__(config, shape, learned_sink=True)
        self.options = config
        self.block, self.stride = config.block, config.stride
        self.compressor = Compressor(
            shape.embed_dim, shape.kv_heads, shape.head_dim, config.stride, overlap=self.overlap
        )

    def pattern_at(self, num_keys: int) -> Pattern:
        return LocalWindow(self.options.window)

    @staticmethod
    def finish(layout: BlockLayout, pattern: Pattern, documents: Tensor | None) -> BlockLayout:
        assert isinstance(pattern, LocalWindow)
        n = layout.num_keys
        mask = interval_mask(n, window=min(pattern.window, n), documents=documents, device=layout.mask.device)
        return BlockLayout(
            layout.kv_indices,
            layout.q_block,
            layout.kv_block,
            mask.queries(n - layout.num_queries, n),
            layout.dense_rows,
        )

    def window_layout(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> BlockLayout:
        return super().layout(num_keys, ctx, device)

    def layout(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> BlockLayout:
        return AttentionCore.layout(self, num_keys, ctx, device)

    def split_granularity(self) -> int:
        return math.lcm(self.block, self.stride)

    def row_costs(self, length: int, unit: int) -> list[float]:
        """Keys that the queries of each unit read, summed, without documents."""
        token = torch.arange(length, dtype=torch.float64)
        read = (token + 1).clamp(max=self.options.window) + self.entries_read(((token + 1) / self.stride).floor())
        return [float(of_unit.sum()) for of_unit in read.split(unit)]

    def entries_read(self, visible: Tensor) -> Tensor:
        """How many of the visible entries a query reads."""
        return visible

    def far(
        self, q: Tensor, x: Tensor, near_lse: Tensor, entries: Entries, ctx: SequenceContext, dropout: Dropout | None
    ) -> tuple[Far, AttentionResult]:
        """Attention of q [B, H, Nq, D] over its entries, and the aux_loss, stats and choice of that.

        near_lse  [B, H, Nq], of the window; there is at least one entry
        """
        raise NotImplementedError(f"{type(self).__name__} has no far")

    @torch.compiler.disable  # tables depend on values
    def all_entries(self, count: int, tokens: Tensor, q_block: int, ctx: SequenceContext) -> BlockLayout:
        """Queries at `tokens` [R] over all of `count` entries that they may read. Layers of the same pass share it."""
        key = ("all entries", count, self.stride, int(tokens[0]), len(tokens), q_block, self.block)
        if key not in ctx.layouts:
            mask = entry_mask(count, self.stride, tokens, ctx)
            ends = torch.arange(q_block - 1, len(tokens) + q_block - 1, q_block, device=tokens.device)
            ended = (tokens[ends.clamp(max=len(tokens) - 1)] + 1) // self.stride  # entries that a row's last query sees
            column = torch.arange(-(-count // self.block), device=tokens.device)
            wanted = (column * self.block < ended[:, None])[None, None]
            if mask.q_doc is not None and mask.kv_doc is not None:  # no block that ends before the row's first document
                last = ((column + 1) * self.block - 1).clamp(max=count - 1)
                wanted = wanted & (mask.kv_doc[:, None, None, last] >= mask.q_doc[:, None, ::q_block, None])
            table = compact(column.to(torch.int32).expand(wanted.shape), wanted)
            ctx.layouts[key] = BlockLayout(table, q_block, self.block, mask, no_dense_rows(tokens.device))
        return ctx.layouts[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        length = sequence_length(k, ctx)
        window = self.window_layout(length, ctx, q.device)
        rows = of_cached_keys(own_rows(window, ctx), ctx)
        dropout = self.dropout(q, ctx)
        near, near_lse = sharded_attention_with_lse(q, k, v, rows, ctx, dropout=dropout)
        entries = self.entries(x, k.dtype, ctx)
        assert self.sink is not None
        if not entries.count:  # no stride is whole; yet all parameters take part in the loss, or DDP would wait
            nothing = torch.stack([p.sum() for p in self.parameters() if p is not self.sink]).sum() * 0.0
            stats = self.without_entries(x, ctx, self._state(ctx)) | {
                "density": torch.tensor(window.density(), device=q.device)
            }
            return AttentionResult(with_sink(near, near_lse, self.sink), nothing, {} if ctx.q_start else stats)
        if dropout is not None:
            dropout = Dropout(dropout.rate, chain(dropout.keys, _FAR.to(dropout.keys.device)))
        far, report = self.far(q, x, near_lse, entries, ctx, dropout)
        out = with_sink(*merged(near, near_lse, far.out, far.lse), self.sink)
        stats = report.stats if ctx.q_start else report.stats | {"density": self._density(window, far.area, ctx)}
        return AttentionResult(out, report.aux_loss, stats, report.choice)

    def without_entries(self, x: Tensor, ctx: SequenceContext, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stats of a sequence that is shorter than a stride."""
        return {}

    def _state(self, ctx: SequenceContext) -> dict[str, Tensor]:
        return {} if ctx.states is None else ctx.states[self.shape.layer]

    def entries(self, x: Tensor, dtype: torch.dtype, ctx: SequenceContext) -> Entries:
        """From x [B, Nq, E]; keys turned by the place of their stride's first token."""
        values = compressed(self.compressor, x, ctx, self._state(ctx), "entries").to(dtype)
        keys, count = values, values.shape[2]
        if ctx.rotary is not None:
            keys = ctx.rotary(values, entry_positions(count, self.stride, ctx, x.device))
        return Entries(keys, values)

    @torch.compiler.disable
    @torch.no_grad()
    def _density(self, window: BlockLayout, far: Tensor, ctx: SequenceContext) -> Tensor:
        (near,), dense = window.areas()[0].T, window.areas()[1]
        if ctx.shard is not None:
            far = sum_over(far, ctx.shard)
        return ((near + far) / dense).mean().float()


def merged(near: Tensor, near_lse: Tensor, far: Tensor, far_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse of one softmax over two sets of keys, from those of each; every query reads something near."""
    share = torch.sigmoid(near_lse - far_lse)[..., None]
    return torch.lerp(far.to(share.dtype), near.to(share.dtype), share).to(near.dtype), torch.logaddexp(
        near_lse, far_lse
    )


def entry_mask(count: int, stride: int, tokens: Tensor, ctx: SequenceContext) -> ElementMask:
    """For queries at `tokens` [R]: an entry is read from its last token on, within its document."""
    last = torch.arange(count, dtype=torch.int32, device=tokens.device) * stride + stride - 1
    return ElementMask(
        q_pos=tokens.to(torch.int32)[None],
        visible_from=last[None],
        visible_until=torch.full_like(last, ALWAYS)[None],
        q_doc=None if ctx.documents is None else ctx.documents[:, tokens],
        kv_doc=entry_documents(count, stride, ctx),
    )


def beside(near: BlockLayout, far: BlockLayout) -> BlockLayout:
    """Two layouts of the same rows and block sizes as one: tokens, then entries. For pictures and density."""
    a, b, padding = near.mask, far.mask, -near.num_keys % near.kv_block

    def joined(x: Tensor, y: Tensor, fill: int) -> Tensor:
        batch = max(len(x), len(y))
        return torch.cat([F.pad(x, (0, padding), value=fill).expand(batch, -1), y.expand(batch, -1)], 1)

    mask = replace(
        a,
        visible_from=joined(a.visible_from, b.visible_from, ALWAYS),
        visible_until=joined(a.visible_until, b.visible_until, ALWAYS),
        kv_doc=None if a.kv_doc is None or b.kv_doc is None else joined(a.kv_doc, b.kv_doc, -1),
        num_tokens=near.num_keys,
    )
    behind = torch.where(far.kv_indices < 0, -1, far.kv_indices + near.num_kv_blocks)
    batch = max(len(behind), len(near.kv_indices))
    table = torch.cat([near.kv_indices.expand(batch, -1, -1, -1), behind.expand(batch, -1, -1, -1)], -1)
    return replace(near, kv_indices=compact(table, table >= 0), mask=mask)


def tokens_of(q: Tensor, ctx: SequenceContext) -> Tensor:
    """Places of the queries in the sequence: int64 [Nq]."""
    if ctx.shard is not None:
        return ctx.shard.tokens.to(q.device)
    return torch.arange(ctx.q_start, ctx.q_start + q.shape[2], device=q.device)
