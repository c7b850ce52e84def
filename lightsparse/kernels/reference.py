"""The `reference` backend: dense scores, the mask written out, one softmax. Quadratic, readable, the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.kernels.dropout import Dropout, keep_scale
from lightsparse.patterns.layout import BlockLayout


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] in q's dtype, lse [B, H, Nq] in fp32 (fp64 for fp64)."""
    with torch.autocast(q.device.type, enabled=False):  # or the truth would round its products to bf16
        return _dense_attention(q, k, v, layout, scale, bias, dropout)


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (x.repeat_interleave(group, 1).to(dtype) for x in (k, v))
    scores = q.to(dtype) @ keys.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + _per_pair(bias.to(dtype), layout, heads)
    explicit = layout.mask.dense
    if explicit is not None and explicit.dtype != torch.bool:
        scores = scores + explicit.to(dtype)
    allowed = layout.to_dense()
    scores = scores.masked_fill(~allowed.repeat_interleave(heads // allowed.shape[1], 1), float("-inf"))

    nothing = (scores == float("-inf")).all(-1, keepdim=True)  # to read: softmax would be NaN there, and is 0
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    if dropout is not None:
        at = torch.arange(layout.num_keys, device=q.device)[None, None]
        weights = weights * keep_scale(dropout, torch.arange(heads, device=q.device), layout.mask.q_pos, at, dtype)
    return (weights @ values).to(q.dtype), scores.logsumexp(-1)


def _per_pair(bias: Tensor, layout: BlockLayout, heads: int) -> Tensor:
    """The bias of each (query block, table entry) on every query–key pair of the tile: [B|1, H, Nq, Nkv]."""
    table = layout.kv_indices.long()
    if table.shape[1] > 1:
        table = table.repeat_interleave(heads // table.shape[1], 1)
    batch, of_heads = max(bias.shape[0], table.shape[0]), max(bias.shape[1], table.shape[1])
    bias = bias.repeat_interleave(of_heads // bias.shape[1], 1).expand(batch, -1, -1, -1)
    table = table.expand(batch, of_heads, -1, -1)
    blocks = layout.num_kv_blocks
    tiles = bias.new_zeros(*table.shape[:3], blocks + 1).scatter_add(3, torch.where(table < 0, blocks, table), bias)[
        ..., :-1
    ]
    pairs = tiles.repeat_interleave(layout.q_block, 2).repeat_interleave(layout.kv_block, 3)
    return pairs[:, :, : layout.num_queries, : layout.num_keys].repeat_interleave(heads // of_heads, 1)
