"""The `routed` backend: every query has a list of key blocks of its own (q_block = 1). Plain operations, any device.

By key block: the queries that chose a block are gathered in tiles, attend to it alone, and a query's parts are merged
by their log-sum-exp. By query: its blocks are gathered and one softmax sees them all. routes.py decides, for some rows
at a time; never are all rows' gathered keys, nor the parts of all rows, in memory at once. The backward computes the
scores again. On CPU the same inputs give the same bits; on CUDA sums of key gradients may be taken in any order.
The names of dimensions are those of routed_call.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightsparse.kernels import blocked
from lightsparse.kernels.compute_dtype import compute_dtype
from lightsparse.kernels.dropout import Dropout, row_hashes
from lightsparse.kernels.routed_call import Call, Gradients, Rows
from lightsparse.kernels.routed_ways import ByBlock, ByQuery
from lightsparse.kernels.routes import counts, routes, slots_by_block
from lightsparse.patterns.layout import BlockLayout

_PARTS = 1 << 23  # numbers in the parts of the rows worked on at once


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] in q's dtype and lse [B, H, Nq], fp32 (fp64 for fp64)."""
    call = Call(q, k, v, layout, scale, bias, dropout)
    out_RD = call.q_RD.new_empty(call.q_RD.shape)
    lse_R = out_RD.new_empty(len(out_RD), dtype=call.dtype)
    for portion in _portions(call):
        out_RD[portion.rows], lse_R[portion.rows] = portion.forward()
    out, lse = call.by_head(out_RD).contiguous(), call.by_head(lse_R).contiguous()
    dtype = compute_dtype(q.dtype, q.device)
    for queries, wide in blocked.dense_row_layouts(layout, q):
        of_rows, keys, values = (x.to(dtype) for x in (q[:, :, queries], k, v))
        part, lse[:, :, queries] = blocked.forward(of_rows, keys, values, wide, scale, None, dropout, with_lse=True)
        out[:, :, queries] = part.to(out.dtype)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    bias: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, if given, the block bias."""
    call = Call(q, k, v, layout, scale, bias, dropout)
    sums = Gradients(call, grad_out, grad_lse, out, lse)
    for portion in _portions(call):
        portion.backward(sums)
    grad_q, grad_k, grad_v = sums.of_inputs()
    dtype = compute_dtype(q.dtype, q.device)
    for queries, wide in blocked.dense_row_layouts(layout, q):
        part_lse = None if grad_lse is None else grad_lse[:, :, queries]
        of_rows, keys, values = (x.to(dtype) for x in (q[:, :, queries], k, v))
        of_out = grad_out[:, :, queries].to(dtype)
        part = blocked.backward(of_out, part_lse, of_rows, keys, values, wide, scale, None, dropout)
        grad_q[:, :, queries] = part[0].to(q.dtype)
        grad_k, grad_v = grad_k + part[1].to(k.dtype), grad_v + part[2].to(v.dtype)
    return grad_q, grad_k, grad_v, sums.of_bias(bias)


def _portions(call: Call) -> Iterator[ByBlock | ByQuery]:
    """All rows, in runs that follow one another: whole heads, or a part of one."""
    per_query = max(call.G * call.K * call.D, 1)
    queries = max(min(_PARTS // per_query, call.N), 1)
    heads = max(_PARTS // (per_query * max(call.N, 1)), 1)
    for z in range(0, call.B * call.Hkv, heads):
        stop = min(z + heads, call.B * call.Hkv)
        for n in range(0, call.N, queries):
            yield _portion(call, range(z, stop), range(n, min(n + queries, call.N)))


def _portion(call: Call, zs: range, ns: range) -> ByBlock | ByQuery:
    first = (zs.start * call.N + ns.start) * call.G
    count = len(zs) * len(ns) * call.G
    z = torch.arange(zs.start, zs.stop, device=call.device)
    n = torch.arange(ns.start, ns.stop, device=call.device)
    b, head = z // call.Hkv, z % call.Hkv
    of_heads = call.table.shape[1]
    list_of = torch.arange(call.lists, device=call.device)
    column = (head if of_heads > 1 else head * 0)[:, None] * (call.lists if of_heads > 1 else 1) + list_of
    sample = b % call.table.shape[0]
    table = call.table[sample[:, None, None], column[:, None, :], n[None, :, None]]  # [z, n, lists, K]
    block = torch.where(table < 0, call.Y, table + (z * call.J).to(torch.int32)[:, None, None, None])
    block_LK, sharing = block.flatten(0, 2), call.G // call.lists
    number = counts(block_LK, call.Y, sharing)
    slots = slots_by_block(number, int(number.sum()) // sharing, sharing, call.S)

    def per_row(values: Tensor) -> Tensor:  # [B|1, N] → of the portion's rows
        return values[b % len(values)][:, ns.start : ns.stop, None].expand(-1, -1, call.G).flatten()

    mask = call.layout.mask
    hashes = None
    if call.dropout is not None:
        heads = head[:, None, None] * call.G + torch.arange(call.G, device=call.device)
        position = mask.q_pos[b % len(mask.q_pos)][:, ns.start : ns.stop, None]
        hashes = row_hashes(call.dropout.keys[b][:, None, None], heads, position).flatten()
    of = Rows(
        slice(first, first + count),
        per_row(mask.q_pos),
        None if mask.q_doc is None or mask.kv_doc is None else per_row(mask.q_doc),
        hashes,
    )
    if slots is None:
        return ByQuery(call, of, block_LK, sharing)
    return ByBlock(call, of, routes(block_LK, number, sharing, slots))
