"""Block-sparse adaptive attention: a small learned router chooses each row's blocks, under a budget for the mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult, AttentionShape, SequenceContext
from lightsparse.attention.pooling.block_means import Summaries, summarise
from lightsparse.attention.selection.router import BlockRouter, Choice, Noise
from lightsparse.attention.sharded_call import sequence_length, sharded_attention
from lightsparse.context_parallel.shard import sum_over
from lightsparse.kernels import chunk_sizes
from lightsparse.patterns import BlockLayout, interval_mask
from lightsparse.patterns.layout import no_dense_rows

_CHUNK, _WIDE_CHUNK = 1 << 20, 1 << 24  # scores of block pairs in memory at once; the second where chunks are wide


@dataclass(frozen=True)
class AdaptiveConfig(AttentionConfig):
    """`density` is the target of the mean gate over the blocks a row may choose; the own block always comes on top, so
    a causal sequence of n blocks reads the share (density · (n − 1) + 2) / (n + 1) of dense attention's tiles.
    """

    density: float | None = 0.1  # target of the budget loss; null: no budget loss
    block: int = 64  # tokens per block, of queries and keys
    k_max: int | None = None  # blocks a row may choose besides its own; null: 2 · density · blocks of the context
    threshold: float = 0.5  # gate from which a block is chosen; 0: always the k_max best
    gate_bias: bool = True  # add log gate to the scores of a chosen block; without it only the budget trains the router
    shared: bool = False  # one choice for all heads, from the summaries of all of them; else one per key/value head
    router_dim: int = 32  # width of the router's product
    budget_weight: float = 10.0  # of (mean gate − density)² in the loss
    tau_start: float = 1.0  # temperature of the gates at the first step
    tau_end: float = 0.3  # and at the last one, reached geometrically; times exp(theta), learned per head

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block", "router_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; it must be at least 1")
        if self.k_max is not None and self.k_max < 1:
            raise ValueError(f"attention.k_max is {self.k_max}; it counts blocks and must be at least 1")
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"attention.threshold is {self.threshold}; a gate reaches it, so it must lie in [0, 1)")
        for name in ("tau_start", "tau_end"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; a temperature must be above 0")
        if not 0.0 <= self.budget_weight < math.inf:
            raise ValueError(f"attention.budget_weight is {self.budget_weight}; it must be at least 0")
        if self.density is None and self.k_max is None:
            raise ValueError("attention.density and attention.k_max are both null; give one of them, or both")
        if not self.gate_bias and (self.density is None or self.budget_weight == 0.0):
            raise ValueError(
                "attention.gate_bias is false and there is no budget loss, so nothing would train the router; "
                "set attention.gate_bias=true, or density and budget_weight"
            )

    def small(self) -> Self:
        return replace(self, block=16, density=0.5, k_max=2, router_dim=8)

    def full(self) -> Self:
        return replace(self, density=1.0, k_max=1 << 24, threshold=0.0, gate_bias=False)


@dataclass(frozen=True, eq=False)
class RoutedBlocks:
    """What a forward pass is going to read.

    layout    its table is [B, Hkv|1, NQ, K]
    bias      log gate of each entry of the table, 0 for the own block; None with gate_bias=false
    aux_loss  scalar: the weighted budget loss
    stats     without gradient; scalars but for `head_density` [Hkv|1]
    state     what decoding has to keep for the next pass, or None
    """

    layout: BlockLayout
    bias: Tensor | None
    aux_loss: Tensor
    stats: dict[str, Tensor]
    state: dict[str, Tensor] | None


class BlockSparseAdaptive(AttentionCore):
    """Row I reads its own block and the blocks J with σ(s[I, J] / τ) ≥ ½, at most k_max of them, the highest first.

    The bias log σ(s / τ) on a chosen block's scores gives router and temperature true gradients from the task. The
    budget loss is (mean of σ(s / τ) over the pairs that could be chosen − density)², of each sample, averaged over
    samples, so that it does not depend on how a batch is split.
    In training s carries τ times standard logistic noise, the difference of two Gumbels. A block is then chosen with
    probability σ(s / τ), so that the budget is about the share that training expects to read. In evaluation only
    the noise is left out. pooling/block_means.py says how summaries keep the future and other documents out.

    Stats: density; head_density [Hkv|1]; router_gate, the mean gate that the budget is about; router_entropy of the
    gates in nats, at most ln 2; router_capped, the share of rows that chose k_max blocks; router_tau, the mean over
    heads.
    """

    Config = AdaptiveConfig
    needs_hidden_states = False
    selects_from_input = True
    logged = ("router_gate", "router_entropy", "router_capped", "router_tau")
    logged_per_head = ("head_density",)
    context_parallel = ("sparse", "gather")
    schedule: Tensor

    def __init__(self, config: AdaptiveConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.options = config  # `config` under its own type
        if config.k_max is not None:
            self.k_max = config.k_max
        elif shape.context is not None and config.density is not None:
            self.k_max = max(1, math.ceil(2 * config.density * -(-shape.context // config.block)))
        else:
            raise ValueError(
                "attention.k_max is null, a share of the context, which is not given; give context, or attention.k_max"
            )
        share = 0.5 if config.density is None else min(max(config.density, 0.01), 0.99)
        heads = 1 if config.shared else shape.kv_heads
        self.router = BlockRouter(heads, shape.head_dim * shape.kv_heads // heads, config.router_dim, share)
        # A tensor, or torch.compile would recompile at every step. In the state_dict, so that the weights alone say
        # which temperature they were trained for; a run that resumes computes it again.
        self.register_buffer("schedule", torch.tensor(config.tau_start))

    def split_granularity(self) -> int:
        return self.options.block

    def set_step(self, step: int, max_steps: int) -> None:
        """Set the temperature of the optimizer step after `step` finished ones, 0 ≤ step < max_steps.

        Call it before a step's first forward pass. Validation uses the temperature as it is.
        """
        done = min(1.0, step / max(1, max_steps - 1))
        start, end = self.options.tau_start, self.options.tau_end
        self.schedule.fill_(start * (end / start) ** done)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        chosen = self.select(q, k, x, ctx)
        dropout = self.dropout(q, ctx)
        out = sharded_attention(q, k, v, chosen.layout, ctx, block_bias=chosen.bias, dropout=dropout)
        if ctx.states is not None and chosen.state is not None:
            ctx.states[self.shape.layer].update(chosen.state)
        return AttentionResult(out, chosen.aux_loss, chosen.stats, chosen.layout.kv_indices)

    def select(self, q: Tensor, k: Tensor, x: Tensor, ctx: SequenceContext) -> RoutedBlocks:
        """The choice for q [B, H, Nq, D] over k [B, Hkv, Nkv, D], as attend makes it; changes no state, not even ctx.

        x is not used. Raises ValueError when ctx.q_start > 0 and ctx.states lacks what earlier tokens have left there.
        """
        block, causal, n = self.options.block, self.shape.causal, sequence_length(k, ctx)
        row = ctx.q_start // block
        with torch.autocast(q.device.type, enabled=False):
            means, state = summarise(q, k, ctx, block=block, causal=causal, layer=self.shape.layer)
            tau_H = self.router.temperature(self.schedule, means.query.dtype)
            choice = self._choice(self.router.projected(means), tau_H, ctx)
            aux_loss = self._budget_loss(choice.gates, choice.pairs)

        mask = interval_mask(n, causal=causal, documents=ctx.documents, device=q.device)
        mask = mask.queries(row * block, n) if ctx.shard is None else mask.of_queries(ctx.shard.tokens.to(q.device))
        layout, bias = BlockLayout(choice.table, block, block, mask, no_dense_rows(q.device)), choice.bias
        within = ctx.q_start - row * block
        if within:
            bias = bias[:, :, torch.arange(within, layout.num_queries, device=q.device) // block]
            layout = layout.per_token(within, layout.num_queries)
        stats = self._stats(layout, choice, tau_H.detach(), ctx)
        return RoutedBlocks(layout, bias if self.options.gate_bias else None, aux_loss, stats, state)

    def _choice(self, of: Summaries, tau_H: Tensor, ctx: SequenceContext) -> Choice:
        """All rows of this rank, some at a time; recomputed in the backward pass, so that no score is kept."""
        noise = None
        if self.training:
            samples = torch.arange(len(of.query), device=of.query.device) if ctx.sample_ids is None else ctx.sample_ids
            noise = Noise(ctx.seed, self.shape.layer, samples)

        def rows(of: Summaries, tau_H: Tensor, start: int, stop: int) -> Choice:
            return self.router.choose(
                of,
                tau_H,
                range(start, stop),
                causal=self.shape.causal,
                k_max=self.k_max,
                threshold=self.options.threshold,
                noise=noise,
            )

        batch, heads, total, _ = of.query.shape
        scores = chunk_sizes.at_once(of.query.device, _CHUNK, _WIDE_CHUNK)
        at_once = max(scores // max(batch * heads * of.key.shape[2], 1), 1)
        runs, shard = [(0, total)], ctx.shard
        if shard is not None:
            runs = shard.plans.get(
                shard, ("runs", self.options.block), lambda: shard.split.runs(shard.rank, self.options.block)
            )
        parts = []
        for first, last in runs:
            for start in range(first, last, at_once):
                arguments = (of, tau_H, start, min(start + at_once, last))
                if torch.is_grad_enabled() and at_once < total:
                    parts.append(checkpoint(rows, *arguments, use_reentrant=False, preserve_rng_state=False))
                else:
                    parts.append(rows(*arguments))
        table, bias, *sums = zip(*parts, strict=True)
        totals = [torch.stack(each).sum(0) for each in sums]
        if shard is not None:
            totals = [sum_over(each, shard) for each in totals]
        return Choice(torch.cat(table, 2), torch.cat(bias, 2), *totals)

    def _budget_loss(self, gates_B: Tensor, pairs_B: Tensor) -> Tensor:
        """Weighted; every parameter is in it, whatever the samples hold, or DDP would wait for its gradient."""
        loss = 0.0 * torch.stack([parameter.sum() for parameter in self.router.parameters()]).sum()
        if self.options.density is not None:
            excess_B = gates_B / pairs_B.clamp(min=1) - self.options.density
            loss = loss + self.options.budget_weight * (excess_B.square() * (pairs_B > 0)).mean()
        return loss

    @torch.no_grad()
    def _stats(self, layout: BlockLayout, choice: Choice, tau_H: Tensor, ctx: SequenceContext) -> dict[str, Tensor]:
        """Of the whole sequence, on every rank."""
        samples, heads, rows, _ = choice.table.shape
        computed_BH, dense_B = layout.areas()
        if ctx.shard is not None:
            rows = -(-ctx.shard.length // self.options.block)
            computed_BH, dense_B = (sum_over(area, ctx.shard) for area in (computed_BH, dense_B))
        of_head = (computed_BH / dense_B[:, None]).mean(0).float()
        pairs = choice.pairs.sum().clamp(min=1)
        return {
            "density": of_head.mean(),
            "head_density": of_head,
            "router_gate": choice.gates.detach().sum() / pairs,
            "router_entropy": choice.entropy / pairs,
            "router_capped": choice.capped / (samples * heads * rows),
            "router_tau": tau_H.mean(),
        }
