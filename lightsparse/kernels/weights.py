"""The attention weights themselves, in block form: for pictures, analysis, distillation and `need_weights`.

The kernels never hold them. Here they are the result: one tile for each entry of the layout's table, O(N · K) numbers,
from plain differentiable operations. Names of dimensions: R = rows of the table at once, Q = queries of a block,
S = keys of a block, K = entries of a row.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightsparse.patterns.layout import BlockLayout, no_dense_rows

_CHUNK = 1 << 24  # elements of the keys or scores of the rows computed at once


def attention_weights(
    q: Tensor, k: Tensor, layout: BlockLayout, *, scale: float | None = None, block_bias: Tensor | None = None
) -> Tensor:
    """Softmax of the scores over the pairs a layout allows: [B, H, NQ, K, q_block, kv_block] in fp32 (fp64 for fp64).

    q           [B, H, Nq, D]
    k           [B, Hkv, Nkv, D]; H a multiple of Hkv
    layout      BlockLayout; entry n of row I of its table says which key block weights[:, :, I, n] belongs to
    scale       multiplies q·k; default 1/√D
    block_bias  [B|1, H|Hkv|1, NQ, K]: added to the scores of that entry

    The weights of a query sum to 1 over (K, kv_block), or are all 0 where it has nothing to read; masked pairs and
    padding are 0. Differentiable in q, k, the bias and a float `mask.dense`.
    Raises ValueError for a layout with dense rows, which have no place in a table of K entries: `list_dense_rows`
    gives one, as wide as the sequence. And for sizes that do not fit.
    """
    batch, heads, nq, dim = q.shape
    if len(layout.dense_rows):
        raise ValueError(
            f"the layout has {len(layout.dense_rows)} dense rows, which a table of {layout.kv_indices.shape[3]} "
            "entries cannot hold; pass list_dense_rows(layout), whose table is as wide as the sequence"
        )
    if (layout.num_queries, layout.num_keys) != (nq, k.shape[2]):
        raise ValueError(
            f"the layout is for {layout.num_queries} queries and {layout.num_keys} keys; q has {nq} and k {k.shape[2]}"
        )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    q_BHNQD = _blocks(q.to(dtype) * scale, layout.q_block)
    k_BHJSD = _blocks(k.to(dtype), layout.kv_block).repeat_interleave(heads // k.shape[1], 1)
    table_BHNK = _of_every_head(layout.kv_indices, batch, heads).long()
    bias_BHNK = None if block_bias is None else _of_every_head(block_bias.to(dtype), batch, heads)

    per_row = batch * heads * table_BHNK.shape[3] * layout.kv_block * max(dim, layout.q_block)
    at_once = max(_CHUNK // max(per_row, 1), 1)
    parts = []
    for start in range(0, layout.num_q_blocks, at_once):
        rows = slice(start, start + at_once)
        bias_BHRK = None if bias_BHNK is None else bias_BHNK[:, :, rows]
        parts.append(_rows(q_BHNQD[:, :, rows], k_BHJSD, table_BHNK[:, :, rows], bias_BHRK, layout, start))
    return torch.cat(parts, dim=2)


def to_dense_weights(weights: Tensor, layout: BlockLayout) -> Tensor:
    """Block form [B, H, NQ, K, q_block, kv_block] → [B, H, Nq, Nkv], 0 for what no query reads. Quadratic in tokens."""
    batch, heads, nq, _, q_block, kv_block = weights.shape
    blocks = layout.num_kv_blocks
    table = _of_every_head(layout.kv_indices, batch, heads).long()
    target = torch.where(table < 0, blocks, table)[..., None, None].expand(weights.shape)
    tiles = weights.new_zeros(batch, heads, nq, blocks + 1, q_block, kv_block).scatter(3, target, weights)
    dense = tiles[:, :, :, :-1].transpose(3, 4).reshape(batch, heads, nq * q_block, blocks * kv_block)
    return dense[:, :, : layout.num_queries, : layout.num_keys]


def list_dense_rows(layout: BlockLayout) -> BlockLayout:
    """The same layout with its dense rows, if any, written into the table, which becomes as wide as the sequence."""
    if not len(layout.dense_rows):
        return layout
    table, blocks = layout.kv_indices, layout.num_kv_blocks
    every = torch.arange(blocks, dtype=torch.int32, device=table.device)
    is_dense = torch.zeros(layout.num_q_blocks, dtype=torch.bool, device=table.device)
    is_dense[layout.dense_rows.long()] = True
    padded = torch.nn.functional.pad(table, (0, blocks - table.shape[3]), value=-1)
    listed = torch.where(is_dense[None, None, :, None], every, padded)
    return replace(layout, kv_indices=listed, dense_rows=no_dense_rows(table.device))


def _rows(
    q_BHRQD: Tensor, k_BHJSD: Tensor, table_BHRK: Tensor, bias_BHRK: Tensor | None, layout: BlockLayout, start: int
) -> Tensor:
    """Weights of the rows from `start` on: [B, H, R, K, Q, S]."""
    device, mask = table_BHRK.device, layout.mask
    batch, heads, rows, _ = table_BHRK.shape
    b, h = torch.arange(batch, device=device), torch.arange(heads, device=device)
    block_BHRK = table_BHRK.clamp(min=0)
    keys_BHRKSD = k_BHJSD[b[:, None, None, None], h[:, None, None], block_BHRK]
    scores_BHRQKS = torch.einsum("bhrqd,bhrksd->bhrqks", q_BHRQD, keys_BHRKSD)
    if bias_BHRK is not None:
        scores_BHRQKS = scores_BHRQKS + bias_BHRK[:, :, :, None, :, None]

    # Indices of the pairs, in the dimensions of the scores; those past the end are clamped and ruled out.
    row = torch.arange(start, start + rows, device=device)[:, None]
    i_RQ = row * layout.q_block + torch.arange(layout.q_block, device=device)
    j_BHRKS = block_BHRK[..., None] * layout.kv_block + torch.arange(layout.kv_block, device=device)
    inside = (i_RQ < layout.num_queries)[:, :, None, None]
    inside = inside & ((table_BHRK >= 0)[..., None] & (j_BHRKS < layout.num_keys))[:, :, :, None]
    i = i_RQ.clamp(max=layout.num_queries - 1)[:, :, None, None]
    j = j_BHRKS.clamp(max=layout.num_keys - 1)[:, :, :, None]
    b, h = b.view(-1, 1, 1, 1, 1, 1), h.view(-1, 1, 1, 1, 1)
    allowed = inside & mask(b, h, i, j)
    if mask.dense is not None:
        explicit = mask.dense[b % mask.dense.shape[0], h % mask.dense.shape[1], i, j]
        if explicit.dtype == torch.bool:
            allowed = allowed & explicit
        else:
            scores_BHRQKS = scores_BHRQKS + explicit.to(scores_BHRQKS.dtype)
            allowed = allowed & (explicit > float("-inf"))

    # A row with nothing to read would be softmax(−inf) = NaN, its gradient too: it gets finite scores, then zeros.
    empty = ~allowed.flatten(-2).any(-1)[..., None, None]
    scores_BHRQKS = scores_BHRQKS.masked_fill(~allowed, float("-inf")).masked_fill(empty, 0.0)
    weights = scores_BHRQKS.flatten(-2).softmax(-1).view_as(scores_BHRQKS)
    return weights.masked_fill(~allowed, 0.0).transpose(3, 4)


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, N, D] → [B, H, ceil(N / block), block, D], padded with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _of_every_head(x: Tensor, batch: int, heads: int) -> Tensor:
    """[B|1, H|Hkv|1, NQ, K] → [B, H, NQ, K]."""
    return x.repeat_interleave(heads // x.shape[1], 1).expand(batch, -1, -1, -1)
