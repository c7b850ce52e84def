"""One small adaptive core and its inputs, for the tests of its choice and of its training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightsparse.attention.adaptive import AdaptiveConfig, BlockSparseAdaptive, RoutedBlocks
from lightsparse.attention.core import AttentionResult, AttentionShape, SequenceContext

BLOCK, DIM, HEADS, KV_HEADS = 8, 16, 4, 2
CONFIG = AdaptiveConfig(block=BLOCK, density=0.4, k_max=3, router_dim=6, tau_start=0.5)
N = 75  # nine blocks and a bit
BORDERS = (None, (32, 48), (5, 37, 38, 61))  # documents: one; starting on blocks; anywhere


def make(*, causal: bool = True, training: bool = False, dtype=torch.float64, **fields) -> BlockSparseAdaptive:
    torch.manual_seed(3)
    core = BlockSparseAdaptive(replace(CONFIG, **fields), AttentionShape(HEADS, KV_HEADS, DIM, HEADS * DIM, 2, causal))
    with torch.no_grad():  # more opinion than at the start, and not the same for all heads
        core.router.theta.add_(torch.linspace(-0.3, 0.2, len(core.router.theta)))
        for matrix in (core.router.query, core.router.key):
            matrix.add_(torch.randn_like(matrix) * 0.3)
    return core.to(dtype).train(training)


def inputs(n: int = N, batch: int = 2, dtype=torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(torch.randn(batch, h, n, DIM, generator=g, dtype=torch.float64).to(dtype) for h in heads)


def documents(borders: tuple[int, ...] | None, n: int = N, batch: int = 2) -> Tensor | None:
    """The first sample has documents at the borders, the second is one document."""
    if borders is None:
        return None
    ids = torch.zeros(batch, n, dtype=torch.int32)
    for border in borders:
        ids[0, border:] += 1
    return ids


def context(n: int = N, ids: Tensor | None = None, seed: int = 5, **fields) -> SequenceContext:
    return SequenceContext(torch.arange(n)[None, fields.get("q_start", 0) :], ids, seed=seed, **fields)


def select(core: BlockSparseAdaptive, qkv, ctx: SequenceContext) -> RoutedBlocks:
    return core.select(qkv[0], qkv[1], qkv[0].transpose(1, 2).flatten(2), ctx)


def run(core: BlockSparseAdaptive, qkv, ctx: SequenceContext) -> AttentionResult:
    return core(*qkv, x=qkv[0].transpose(1, 2).flatten(2), ctx=ctx)
