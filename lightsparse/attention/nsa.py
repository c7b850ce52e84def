"""NSA, native sparse attention (Yuan et al. 2025, arXiv 2502.11089): summaries, chosen blocks and a window, gated.

o_t = Σ_c g_c(x_t) · Attn_c(q_t), c one of compressed, selected, window (eq. 5); g is a sigmoid per query head, and the
three are not normalised. Each branch is a softmax of its own. What the compressed branch attends to decides which
blocks of tokens the selected branch reads (nsa_select.py); that choice has no gradient, so the compression learns
through its own branch alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.pooling.nsa_compress import complete, summary_layout
from lightsparse.attention.pooling.nsa_keys import KeysValues, SummaryKeys, WindowKeys
from lightsparse.attention.pooling.nsa_picture import together
from lightsparse.attention.selection.dense_warning import warn_if_dense
from lightsparse.attention.selection.kept_mass import kept_mass, queries_at, sampled_queries
from lightsparse.attention.selection.nsa_select import Selector
from lightsparse.attention.selection.row_parts import BlockSelection, RowPart, attend_in_parts, row_layout
from lightsparse.attention.sharded_call import sequence_length
from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from lightsparse.context_parallel.shard import sum_over
from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import BlockLayout

BRANCHES = ("compressed", "selected", "window")
_APART = 1 << 20  # between the layer numbers under which the branches draw their dropout


@dataclass(frozen=True)
class NsaConfig(AttentionConfig):
    compress_block: int = 32  # l: tokens that a summary stands for
    compress_stride: int = 16  # d: tokens from one summary to the next; divides compress_block and select_block
    compress: Literal["mlp", "mean"] = "mlp"
    compress_hidden: int | None = None  # width of the MLP; null: head_dim. Not given in the paper
    select_block: int = 64  # l': tokens per block that is chosen, and the tile of the computation
    top_n: int = 8  # n: blocks that a query reads, those of `first` and `local` included; the paper: 16
    first: int = 1  # blocks at the document's start that every query reads
    local: int = 2  # the own block and those right before it
    window: int = 256  # w: tokens; the paper: 512
    branch_kv: Literal["shared", "own"] = "shared"  # the layer's keys and values for all branches, or its own for each

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compress_block", "compress_stride", "select_block", "local", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; it must be at least 1")
        if self.first < 0:
            raise ValueError(f"attention.first is {self.first}; it counts blocks and must be at least 0")
        for name in ("compress_block", "select_block"):
            if getattr(self, name) % self.compress_stride:
                raise ValueError(
                    f"attention.{name} is {getattr(self, name)}; it must be a multiple of attention.compress_stride, "
                    f"which is {self.compress_stride}"
                )
        if self.top_n < self.first + self.local:
            raise ValueError(
                f"attention.top_n is {self.top_n}; it counts the {self.first} first and {self.local} local blocks, so "
                f"it must be at least {self.first + self.local}, or lower attention.first and attention.local"
            )
        for name, choices in (("compress", ("mlp", "mean")), ("branch_kv", ("shared", "own"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"attention.{name} is {getattr(self, name)!r}; use {' or '.join(choices)}")
        if self.compress_hidden is not None and (self.compress_hidden < 1 or self.compress == "mean"):
            raise ValueError(
                f"attention.compress_hidden is {self.compress_hidden}; it is the width of compress=mlp, at least 1, "
                "and null with compress=mean"
            )
        if self.density is not None:
            raise ValueError(
                f"attention.density is {self.density}; a query reads top_n blocks and a window whatever the context: "
                "set attention.top_n and attention.window, or use attention=adaptive"
            )

    def small(self) -> Self:
        return replace(self, compress_block=8, compress_stride=4, select_block=16, top_n=4, window=21)

    def full(self) -> Self:
        """Everything in the selected branch and in the window; the gates remain."""
        return replace(self, top_n=1 << 24, window=1 << 24)


class Gates(nn.Module):
    """How much of each branch a token takes (eq. 5): σ(W x + b) per branch and query head; ½ at the start."""

    def __init__(self, shape: AttentionShape):
        super().__init__()
        rows = len(BRANCHES) * shape.heads
        self.weight = nn.Parameter(torch.randn(rows, shape.embed_dim) * 0.02)
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x_BNE: Tensor) -> tuple[Tensor, ...]:
        """Of each branch, in the order of BRANCHES: [B, H, N], at least fp32."""
        dtype = torch.promote_types(x_BNE.dtype, torch.float32)
        with torch.autocast(x_BNE.device.type, enabled=False):
            logits = F.linear(x_BNE.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return logits.sigmoid().unflatten(-1, (len(BRANCHES), -1)).permute(2, 0, 3, 1).unbind(0)


@torch.no_grad()
def mean_gates(gates: tuple[Tensor, ...], length: int, ctx: SequenceContext) -> dict[str, Tensor]:
    """Scalars for the log, over all `length` tokens of the sequence."""
    sums = torch.stack([gate.mean((0, 1)).sum() for gate in gates])
    if ctx.shard is not None:
        sums = sum_over(sums, ctx.shard)
    return {f"gate_{branch}": mean.float() for branch, mean in zip(BRANCHES, sums / length, strict=True)}


class NsaAttention(AttentionCore):
    """Each token reads summaries of its whole past, the blocks whose summaries it attends to most, and a window.

    A block is chosen per token and key/value head, by fp32 scores with autocast off; equal ones go to the lower block.
    With documents, first blocks and summaries are those of the query's document; a summary that would cross a border
    is never read, and a query that sees no summary gets 0 from that branch.
    With branch_kv=own the layer's keys and values are the selected branch's, and the other two project their own.

    Stats: density, of all three branches; kept_mass, the share of dense attention's weight on the chosen blocks, on a
    few sampled queries; the mean gate of each branch. `choice` is the table's row of each block's last token.
    """

    Config = NsaConfig
    supports_bidirectional = False
    exact_at_full_budget = False  # three gated outputs, no mean of values
    selects_from_input = True
    logged = ("kept_mass", *(f"gate_{branch}" for branch in BRANCHES))
    context_parallel = ("sparse", "gather")

    def __init__(self, config: NsaConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.options = config  # `config` under its own type
        own = config.branch_kv == "own"
        hidden = None if config.compress == "mean" else config.compress_hidden or shape.head_dim
        self.summaries = SummaryKeys(shape, config.compress_block, config.compress_stride, hidden, own)
        self.window_keys = WindowKeys(shape, config.window, config.select_block) if own else None
        self.window = SlidingWindowAttention(
            SlidingWindowConfig(window=config.window, sinks=0, block=config.select_block, dropout=config.dropout),
            replace(shape, layer=shape.layer + 2 * _APART),
        )
        self.selector = Selector(
            config.compress_block,
            config.compress_stride,
            config.select_block,
            config.top_n,
            config.first,
            config.local,
        )
        self.gate = Gates(shape)
        warn_if_dense("attention.top_n × attention.select_block", config.top_n * config.select_block, shape.context)
        warn_if_dense("attention.window", config.window, shape.context)

    def selector_parameters(self) -> list[nn.Parameter]:
        """None: what chooses is the compressed branch, which is read as well."""
        return []

    def split_granularity(self) -> int:
        return self.options.select_block

    def row_costs(self, length: int, unit: int) -> list[float]:
        """Keys that the queries of each unit read, summed, without documents."""
        of = self.options
        t = torch.arange(length)
        chosen = (t // of.select_block + 1).clamp(max=of.top_n) * of.select_block
        read = t // of.compress_stride + chosen + t.clamp(max=of.window)
        return [float(keys.sum()) for keys in read.split(unit)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        n = sequence_length(k, ctx)
        of_summaries = self.summaries(k, v, x, n, ctx)
        compressed, area = self._compressed(q, of_summaries, n, ctx)
        part = self._selected(q, k, v, of_summaries.k, n, ctx)
        near, of_window = KeysValues(k, v), ctx
        if self.window_keys is not None:
            near, of_window = self.window_keys(x, ctx)
        window = self.window(q, *near, x=x, ctx=of_window)
        gates = self.gate(x)
        out = sum(g[..., None] * o for g, o in zip(gates, (compressed, part.out, window.out), strict=True))
        out = out.to(q.dtype)
        if ctx.q_start:
            return AttentionResult(out)
        stats = {
            "density": window.stats["density"] + self._density(area, part, n, ctx, q.device),
            "kept_mass": self._kept_mass(q, k, of_summaries.k, n, ctx),
            **mean_gates(gates, n, ctx),
        }
        return AttentionResult(out, stats=stats, choice=part.choice)

    def _compressed(self, q: Tensor, of: KeysValues, n: int, ctx: SequenceContext) -> tuple[Tensor, Tensor]:
        """[B, H, Nq, D] and the query–key area of its tiles, fp64 [B|1, 1]. Every rank has all summaries."""
        if not of.k.shape[2]:  # nothing to read yet, but the parameters stay in the graph
            return q * 0 + (of.k.sum() + of.v.sum()).to(q.dtype), q.new_zeros(1, 1, dtype=torch.float64)
        layout = self._summary_layout(n, self._tokens(q, ctx), ctx)
        k, v, dropout = of.k.to(q.dtype), of.v.to(q.dtype), self.dropout(q, ctx)
        return block_sparse_attention(q, k, v, layout, dropout=dropout), layout.areas()[0]

    @torch.compiler.disable
    def _summary_layout(self, n: int, tokens: Tensor, ctx: SequenceContext) -> BlockLayout:
        """Layers of the same pass share it."""
        of = self.options
        key = ("nsa", of.compress_block, of.compress_stride, of.select_block)
        if key not in ctx.layouts:
            ctx.layouts[key] = summary_layout(
                tokens,
                complete(n, of.compress_block, of.compress_stride),
                block=of.compress_block,
                stride=of.compress_stride,
                tile=of.select_block,
                documents=ctx.documents,
            )
        return ctx.layouts[key]

    def _tokens(self, q: Tensor, ctx: SequenceContext) -> Tensor:
        """Places of the queries in the sequence."""
        if ctx.shard is not None:
            return ctx.shard.tokens.to(q.device)
        return torch.arange(ctx.q_start, ctx.q_start + q.shape[2], device=q.device)

    def _selected(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, n: int, ctx: SequenceContext) -> RowPart:
        block, keys = self.options.select_block, keys.detach()

        def layout_of(part: slice) -> tuple[BlockLayout, Tensor]:
            return self._layout(q[:, :, part], keys, ctx.q_start + part.start, n, ctx)

        entries = q.shape[0] * self.shape.kv_heads * min(self.options.top_n, -(-n // block))
        dropout = self.dropout(q, ctx, _APART)
        return attend_in_parts(layout_of, q, k, v, entries, block, n, ctx, dropout)

    def _layout(
        self, q: Tensor, keys: Tensor, first: int, length: int, ctx: SequenceContext
    ) -> tuple[BlockLayout, Tensor]:
        """What these queries read of the tokens, and their places in the sequence."""
        return row_layout(
            lambda tokens: self.choose(q, keys, tokens, length, ctx),
            q.shape[2],
            first,
            length,
            self.options.select_block,
            ctx,
        )

    @torch.compiler.disable  # depends on values
    @torch.no_grad()
    def choose(self, q: Tensor, keys: Tensor, tokens: Tensor, length: int, ctx: SequenceContext) -> Tensor:
        """The blocks of some queries [B, H, R, D] at `tokens` [R], ascending: int32 [B, Hkv, R, K].

        keys  [B, Hkv, S, D] of all summaries of the sequence of `length` tokens
        """
        with torch.autocast(q.device.type, enabled=False):
            return self.selector.table(q, keys, tokens, length, ctx.documents)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, x: Tensor, ctx: SequenceContext) -> BlockSelection:
        """What attend reads in all three branches, for pictures: summaries behind the tokens, repeats kept."""
        n = sequence_length(k, ctx)
        keys = self.summaries(k, k, x, n, ctx).k
        chosen, tokens = self._layout(q, keys, ctx.q_start, n, ctx)
        summaries = self._summary_layout(n, tokens, ctx) if keys.shape[2] else None
        return BlockSelection(together(chosen, self.window.layout(n, ctx, q.device), summaries))

    @torch.no_grad()
    def _density(self, area: Tensor, part: RowPart, n: int, ctx: SequenceContext, device: torch.device) -> Tensor:
        """Of the compressed and the selected branch: scalar."""
        computed, dense = part.computed, part.dense
        if ctx.shard is not None:
            area, computed, dense = (sum_over(t, ctx.shard) for t in (area, computed, dense))
        tiles = self.window.layout(n, ctx, device).areas()[1]  # dense attention's, in the compressed branch's tiles
        return ((area / tiles[:, None]).mean() + (computed / dense[:, None]).mean()).float()

    def _kept_mass(self, q: Tensor, k: Tensor, keys: Tensor, n: int, ctx: SequenceContext) -> Tensor:
        at = sampled_queries(n, q.device)
        q_at = queries_at(q, at, ctx)
        table = self.choose(q_at, keys, at, n, ctx).repeat_interleave(q.shape[1] // k.shape[1], 1)
        return kept_mass(q_at, k, table, at, self.options.select_block, ctx)
