"""LongNet's dilated attention (Ding et al. 2023, arXiv 2307.02486, section 2.2), exact and differentiable throughout.

Each (w, r) is dense attention inside segments of w tokens among every r-th of them, another residue per key/value head;
the branches are mixed per token and head (eq. 9–10):

    O = Σ_i α_i O_i,   α_i ∝ s_i = Σ_j exp(q · k_j) over the keys of branch i

That is one softmax over the multiset union of what the branches read. The gradient goes through α, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from lightsparse.attention.core import (
    AttentionConfig,
    AttentionCore,
    AttentionResult,
    AttentionShape,
    KeyExpiry,
    SequenceContext,
)
from lightsparse.attention.dense import refuse_unfit
from lightsparse.attention.segments.across_ranks import share
from lightsparse.attention.segments.gather import Branch, Gather, Sizes, dense_area, gathers, last_rows
from lightsparse.attention.sharded_call import (
    own_rows,
    sequence_length,
    sharded_attention,
    sharded_attention_with_lse,
)
from lightsparse.context_parallel.key_owners import Sources
from lightsparse.kernels import Dropout
from lightsparse.patterns import BlockLayout, Pattern
from lightsparse.utils.hashing import chain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DilatedConfig(AttentionConfig):
    segment_lengths: tuple[int, ...] = (
        256,
        512,
        1024,
        2048,
        4096,
    )  # tokens, the paper's 2048 … 32768 for a context of 4096
    dilation_rates: tuple[int, ...] = (1, 2, 4, 6, 12)  # tokens, one per segment length
    branches: Literal["all", "partition"] = "all"  # every head takes every (w, r), or each group of heads one of them
    pattern: Pattern | None = None  # only pairs that this pattern reads, too; null: all
    block: int = 64  # tokens per tile of the computation; with a pattern, per block of its grid

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths, rates = self.segment_lengths, self.dilation_rates
        if not lengths or len(lengths) != len(rates):
            raise ValueError(
                f"attention.segment_lengths is {list(lengths)} and attention.dilation_rates is {list(rates)}; "
                "they need the same number of entries, at least one"
            )
        for length, rate in zip(lengths, rates, strict=True):
            if not 1 <= rate <= length:
                raise ValueError(
                    f"attention.dilation_rates has {rate} for a segment length of {length}; both count tokens, and a "
                    "rate must lie between 1 and its segment length"
                )
        if self.branches not in ("all", "partition"):
            raise ValueError(f"attention.branches is {self.branches!r}; it must be all or partition")
        if self.block < 1:
            raise ValueError(f"attention.block is {self.block}; it counts tokens and must be at least 1")
        if self.density is not None:
            raise ValueError(
                f"attention.density is {self.density}; segment_lengths and dilation_rates set the density of dilated "
                "attention together and none of them can be solved alone: set them, or use attention=block_sparse"
            )

    def small(self) -> Self:
        return replace(self, segment_lengths=(16, 40, 96), dilation_rates=(1, 2, 3), block=16)

    def full(self) -> Self:
        return replace(self, segment_lengths=(1 << 24,), dilation_rates=(1,), branches="all", pattern=None)


class DilatedAttention(AttentionCore):
    """Mixture of dilated segments; O(N · Σ w/r²) time over the heads of a branch, O(N) memory.

    LongNet (Ding et al. 2023, arXiv 2307.02486, eq. 9–10). A position that a branch does not keep has weight 0 in it;
    one that no branch keeps gives 0. Shapes of a call: AttentionCore.forward. Raises ValueError for branches=partition
    with fewer key/value heads than branches.
    """

    Config = DilatedConfig
    needs_hidden_states = False
    config: DilatedConfig
    context_parallel = ("sparse", "gather")

    def __init__(self, config: DilatedConfig, shape: AttentionShape):
        super().__init__(config, shape)
        pairs = list(zip(config.segment_lengths, config.dilation_rates, strict=True))
        every = range(shape.kv_heads)
        groups = [every] * len(pairs)
        if config.branches == "partition":
            if shape.kv_heads < len(pairs):
                raise ValueError(
                    f"attention.branches is partition with {len(pairs)} segment lengths for {shape.kv_heads} key/value "
                    f"heads; each segment length needs one, so list fewer or set model.kv_heads={len(pairs)}"
                )
            borders = [len(every) * i // len(pairs) for i in range(len(pairs) + 1)]
            groups = [every[start:stop] for start, stop in pairwise(borders)]
        self.branches = tuple(Branch(w, r, tuple(group)) for (w, r), group in zip(pairs, groups, strict=True))
        sparse = [b.rate for b in self.branches if len({head % b.rate for head in b.kv_heads}) < b.rate]
        if sparse:
            log.info(
                "dilation rates %s need as many key/value heads; with %d, no head reads some tokens through them",
                sparse,
                shape.kv_heads,
            )
        if config.pattern is not None:
            refuse_unfit(config.pattern, shape, config.block)

    def split_granularity(self) -> int:
        return self.config.block

    def key_expiry(self, until: int, documents: Tensor | None = None) -> KeyExpiry | None:
        block = self.config.block
        if self.config.pattern is not None:  # its slots are laid out from the first token on
            return None
        return KeyExpiry(until, block, last_rows(self.config.segment_lengths, until, block, documents))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        # Where every head has one branch there is nothing to weigh, and kernels without a differentiable lse will do.
        weighed = self.config.branches == "all" and len(self.branches) > 1
        parts, density = self._parts(q.contiguous(), k.contiguous(), v.contiguous(), ctx, weighed)
        out = _mixture(parts, q) if weighed else _side_by_side([part for of_branch in parts for part in of_branch], q)
        return AttentionResult(
            out, stats={} if density is None else {"density": torch.tensor(density, device=q.device)}
        )

    @torch.compiler.disable  # every gather has its own sizes and would be compiled apart, to wait for the same kernels
    def _parts(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: SequenceContext, weighed: bool
    ) -> tuple[list[list[_Part]], float | None]:
        """What each gather of each branch gives, and the density, None while decoding."""
        length = sequence_length(k, ctx)
        plan = self._plan(length, ctx, q.device)
        dropout = self.dropout(q, ctx)
        parts = [
            [_attend(q, k, v, gather, _of_gather(dropout, branch, gather), weighed, ctx) for gather in of_branch]
            for branch, of_branch in enumerate(plan.gathers)
            if of_branch
        ]
        return parts, plan.density

    def _plan(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> _Plan:
        """Built once for all layers of a pass; without documents once for all passes of these sizes."""
        shape, config, documents = self.shape, self.config, ctx.documents
        sizes = Sizes(
            num_keys, ctx.q_start, shape.heads, shape.kv_heads, shape.causal, config.block, config.pattern, device
        )
        if documents is None or bool((documents == documents[:, :1]).all()):
            return _plan_without_documents(self.branches, sizes)
        key = (type(self), self.branches, sizes)
        if key not in ctx.layouts:
            ctx.layouts[key] = _plan_of(self.branches, sizes, documents)
        return ctx.layouts[key]


class _Plan(NamedTuple):
    gathers: list[list[Gather]]  # of each branch
    density: float | None  # None while decoding


def _plan_of(branches: tuple[Branch, ...], sizes: Sizes, documents: Tensor | None) -> _Plan:
    of_branches = [gathers(branch, sizes, documents) for branch in branches]
    if sizes.q_start:
        return _Plan(of_branches, None)
    dense = dense_area(sizes, documents) * sizes.kv_heads
    computed = sum((gather.area for of_branch in of_branches for gather in of_branch), torch.zeros_like(dense))
    return _Plan(of_branches, float((computed / dense).mean()))


@lru_cache(maxsize=16)
def _plan_without_documents(branches: tuple[Branch, ...], sizes: Sizes) -> _Plan:
    with torch.inference_mode(False):  # a plan first made while evaluating serves training too
        return _plan_of(branches, sizes, None)


class _Part(NamedTuple):
    """What one gather gives to R of the B · H · Nq output rows, numbered in that order."""

    rows: Tensor | None  # int64 [R]; B · H · Nq for what belongs to no row, None = every row in order
    out: Tensor  # [R, D]
    lse: Tensor  # [R] fp32 (fp64 for fp64); 0 where there is nothing to weigh


def _of_gather(dropout: Dropout | None, branch: int, gather: Gather) -> Dropout | None:
    """Dropout of its own for each gather: the kernel counts heads and keys within the gather."""
    if dropout is None:
        return None
    part = torch.tensor(branch, device=dropout.keys.device)
    return Dropout(dropout.rate, chain(dropout.keys, part, gather.kv_heads[0]))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, gather: Gather, dropout: Dropout | None, weighed: bool, ctx: SequenceContext
) -> _Part:
    """Attention of one gather. q [B, H, Nq, D], k/v [B, Hkv, N, D], contiguous."""

    def outputs(
        q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, sources: Sources | None = None, heads: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """out and lse, which is 0 where nobody weighs by it."""
        if weighed:
            return sharded_attention_with_lse(q, k, v, layout, ctx, sources=sources, kv_heads=heads, dropout=dropout)
        out = sharded_attention(q, k, v, layout, ctx, sources=sources, kv_heads=heads, dropout=dropout)
        return out, out.new_zeros(out.shape[:3])

    group, nkv = q.shape[1] // k.shape[1], k.shape[2]
    if gather.positions is None:
        first = 0 if ctx.shard is not None else nkv - gather.layout.num_keys
        out, lse = outputs(q, k[:, :, first:], v[:, :, first:], own_rows(gather.layout, ctx))
        return _Part(None, out.flatten(0, 2), lse.flatten())

    q_heads = (gather.kv_heads[:, None] * group + torch.arange(group, device=q.device)).flatten()
    if ctx.shard is None:
        layout, sources = gather.layout, None
        of_queries = gather.positions[:, :, -layout.num_queries :] - ctx.q_start
        forgotten = ctx.q_start + q.shape[2] - nkv  # tokens before those of k, no longer read
        kv_rows = _rows(gather.positions - forgotten, gather.kv_heads, k)
        k, v = _taken(k, kv_rows), _taken(v, kv_rows)
    else:
        layout, of_queries, sources = share(gather, k, ctx)
    of_queries = of_queries.repeat_interleave(group, 1)
    q_rows = _rows(of_queries, q_heads, q)
    out, lse = outputs(_taken(q, q_rows), k, v, layout, sources, len(gather.kv_heads))
    # Spare slots and tokens that are no queries here go to a row behind the last.
    rows = torch.where(of_queries >= 0, q_rows, q.shape[:3].numel())
    return _Part(rows.flatten(), out.flatten(0, 2), lse.flatten())


def _rows(positions: Tensor, heads: Tensor, of: Tensor) -> Tensor:
    """Rows of `of` [B, H, N, D], flattened to [B · H · N, D], for positions [B|1, h, S] of heads [h]: int64 [B, h, S].

    Where there is no position (below 0) the head's first row stands in, and is not read.
    """
    batch, num_heads, n, _ = of.shape
    sample = torch.arange(batch, device=of.device)[:, None, None]
    return (sample * num_heads + heads[None, :, None]) * n + positions.clamp(min=0)


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, h, S] of x [B, H, N, D]: [B, h, S, D]."""
    return x.flatten(0, 2).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


def _side_by_side(parts: list[_Part], q: Tensor) -> Tensor:
    """Parts that share no row, in the shape of q [B, H, Nq, D]; rows without a part are 0."""
    rows = q.shape[:3].numel()
    out = q.new_zeros(rows + 1, q.shape[-1])
    for part in parts:
        if part.rows is None:  # then it is the only one
            return part.out.view_as(q)
        out.index_copy_(0, part.rows, part.out)
    return out[:rows].view_as(q)


def _mixture(branches: list[list[_Part]], q: Tensor) -> Tensor:
    """Σ α_i O_i in the shape of q [B, H, Nq, D], α_i ∝ exp(lse_i) over the branches that keep the row (eq. 9–10)."""
    if not branches:
        return torch.zeros_like(q)
    rows = q.shape[:3].numel()
    lse_iR = torch.stack([_lse_of_all_rows(parts, rows) for parts in branches])
    # A row that no branch keeps would be softmax(−inf) = NaN; what is multiplied with its weights is zero.
    nowhere = (lse_iR == float("-inf")).all(0)
    weights_iR = lse_iR.masked_fill(nowhere, 0.0).softmax(0)
    out = torch.zeros(rows + 1, q.shape[-1], dtype=weights_iR.dtype, device=q.device)
    for weights_R, parts in zip(weights_iR, branches, strict=True):
        for part in parts:
            if part.rows is None:
                out[:rows].add_(weights_R[:rows, None] * part.out)
            else:
                out.index_add_(0, part.rows, weights_R.index_select(0, part.rows)[:, None] * part.out)
    return out[:rows].to(q.dtype).view_as(q)


def _lse_of_all_rows(parts: list[_Part], rows: int) -> Tensor:
    """The lse of one branch on every row and one behind the last, −inf where it keeps nothing: [rows + 1]."""
    lse = parts[0].lse.new_full((rows + 1,), float("-inf"))
    for part in parts:
        if part.rows is None:
            lse[:rows].copy_(part.lse)
        else:
            lse.index_copy_(0, part.rows, part.lse)
    return lse
