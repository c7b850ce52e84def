"""Heavily compressed attention, HCA (DeepSeek-V4, section 2.3.2): a window, and all entries of very long strides.

Every `stride` tokens become one entry (csa_compress.py, eq. 20–23), and a query reads all entries that end at or before
it, without a choice, beside a near window and a learned sink, under one softmax. How this differs from V4's layer as a
whole: compressed.py. V4 alternates HCA with CSA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightsparse.attention.core import AttentionResult, SequenceContext
from lightsparse.attention.pooling.compressed import (
    CompressedAttention,
    CompressedConfig,
    Entries,
    Far,
    beside,
    tokens_of,
)
from lightsparse.kernels import Dropout, block_sparse_attention_with_lse
from lightsparse.patterns import BlockLayout


@dataclass(frozen=True)
class HcaConfig(CompressedConfig):
    stride: int = 32  # tokens per compressed entry; the paper: 128

    def small(self) -> Self:
        return replace(self, window=21, stride=16, block=16)


class HcaAttention(CompressedAttention):
    """Each token reads the `window` tokens up to itself and one entry for every whole stride before or at it."""

    Config = HcaConfig

    def far(
        self, q: Tensor, x: Tensor, near_lse: Tensor, entries: Entries, ctx: SequenceContext, dropout: Dropout | None
    ) -> tuple[Far, AttentionResult]:
        layout = self.all_entries(entries.count, tokens_of(q, ctx), 1 if ctx.q_start else self.block, ctx)
        out, lse = block_sparse_attention_with_lse(q, entries.keys, entries.values, layout, dropout=dropout)
        return Far(out, lse, layout.areas()[0].mean(1)), AttentionResult(out)

    def layout(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> BlockLayout:
        """Tokens and, behind them, entries."""
        window = self.window_layout(num_keys, ctx, device)
        tokens = torch.arange(ctx.q_start, num_keys, device=device)
        return beside(window, self.all_entries(num_keys // self.stride, tokens, window.q_block, ctx))
