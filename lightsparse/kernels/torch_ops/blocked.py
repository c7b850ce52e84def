"""The `blocked` backend: each list of key blocks gathered for the queries that read it. Any layout, any device.

Exact because one softmax sees a query's whole selection; no online pass is needed. Memory is linear in N: the keys of a
few lists are gathered at a time, and the backward computes the scores again. Names of dimensions: those of call.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightsparse.kernels import chunk_sizes
from lightsparse.kernels.compute_dtype import compute_dtype
from lightsparse.kernels.dropout import Dropout
from lightsparse.kernels.operator import with_gradients
from lightsparse.kernels.torch_ops.call import Call, Gradients
from lightsparse.kernels.torch_ops.lists import Lists
from lightsparse.patterns.layout import BlockLayout, no_dense_rows
from lightsparse.utils.compat.torch import softmax_backward

_INDICES = 1 << 17  # key blocks or queries of the lists that are looked up at once
_DENSE_ROW_SCORES = 1 << 22  # of a tile of queries that read everything
_WIDE_INDICES, _WIDE_DENSE_ROW_SCORES = 1 << 23, 1 << 26  # where chunks are wide


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] in q's dtype and lse [B, H, Nq] in fp64."""
    call = Call(q, k, v, layout, scale, bias, dropout, compute_dtype(q.dtype, q.device))
    out_LMD, lse_LM = call.nothing_read(q.dtype)
    for lists in all_lists(call):
        attend(lists, out_LMD, lse_LM)
    out, lse = call.by_head(out_LMD), call.by_head(lse_LM)
    for queries, wide in dense_rows(layout, q):
        out[:, :, queries], lse[:, :, queries] = forward(q[:, :, queries], k, v, wide, scale, None, dropout)
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
    call = Call(q, k, v, layout, scale, bias, dropout, compute_dtype(q.dtype, q.device))
    sums = Gradients(call, grad_out, grad_lse)
    for lists in all_lists(call):
        add_gradients(lists, sums)
    dq, dk, dv, dbias = sums.of_inputs(k, bias)
    for queries, wide in dense_rows(layout, q):
        dlse = None if grad_lse is None else grad_lse[:, :, queries]
        dout, out_rows, lse_rows, q_rows = (x[:, :, queries] for x in (grad_out, out, lse, q))
        part = backward(dout, dlse, out_rows, lse_rows, q_rows, k, v, wide, scale, None, dropout)
        dq[:, :, queries], dk, dv = part[0], dk + part[1], dv + part[2]
    return dq, dk, dv, dbias


def attend(lists: Lists, out_LMD: Tensor, lse_LM: Tensor) -> None:
    """Write the lists' rows of the output and of the log-sum-exp."""
    call = lists.call
    for part in lists.parts():
        scores_LMC = part.masked_scores(part.gathered(call.k_YSD))
        most_LM1, p_LMC = _softmax(scores_LMC, call.sum_dtype, call.wide)
        # The largest weight is exp(most − lse): no exp is needed. Where nothing is read, −inf − log 0 would be NaN.
        lse_LM1 = most_LM1.double() - p_LMC.amax(-1, keepdim=True).log()
        lse_LM[part.of_call] = torch.where(most_LM1 == float("-inf"), most_LM1, lse_LM1).squeeze(-1)
        p_LMC = p_LMC.to(call.score_dtype)
        if (keep_LMC := part.dropout_LMC()) is not None:
            p_LMC.mul_(keep_LMC)
        out_LMD[part.of_call] = call.product(p_LMC.to(call.dtype), part.gathered(call.v_YSD)).to(out_LMD.dtype)


def add_gradients(lists: Lists, sums: Gradients) -> None:
    """Add the lists' share of all gradients."""
    call = lists.call
    for part in lists.parts():
        of_call = part.of_call
        k_LCD, v_LCD = part.gathered(call.k_YSD), part.gathered(call.v_YSD)
        dout_LMD = sums.dout_LMD[of_call].to(call.dtype)
        _, p_LMC = _softmax(part.masked_scores(k_LCD), call.score_dtype, call.wide)
        dp_LMC, weights_LMC = call.product(dout_LMD, v_LCD.mT), p_LMC
        if (keep_LMC := part.dropout_LMC()) is not None:
            dp_LMC.mul_(keep_LMC)
            weights_LMC = p_LMC * keep_LMC
        ds_LMC = softmax_backward(dp_LMC, p_LMC)
        if sums.dlse_LM is not None:  # d lse / d s = p
            ds_LMC.addcmul_(p_LMC, sums.dlse_LM[of_call, :, None].to(call.score_dtype))
        if sums.dbias_LGK is not None:
            ds_LQGKS = ds_LMC.unflatten(1, (call.Q, call.G)).unflatten(-1, (part.K, call.S))
            sums.dbias_LGK[of_call, :, : part.K] = ds_LQGKS.sum((1, 4), dtype=call.sum_dtype)
        ds_LMC, weights_LMC = ds_LMC.to(call.dtype), weights_LMC.to(call.dtype)
        sums.dq_LMD[of_call] = call.product(ds_LMC, k_LCD)
        dk_LCD, dv_LCD = call.product(ds_LMC.mT, part.q_LMD), call.product(weights_LMC.mT, dout_LMD)
        sums.add_keys(part.block_LK.flatten(), dk_LCD, dv_LCD)


def dense_rows(layout: BlockLayout, q: Tensor) -> Iterator[tuple[Tensor, BlockLayout]]:
    """Queries of the rows that read every block, if any, and a layout of their own, in smaller tiles."""
    if not len(layout.dense_rows):
        return
    rows = layout.dense_rows.long()[:, None] * layout.q_block + torch.arange(layout.q_block, device=q.device)
    queries = rows.flatten()[rows.flatten() < layout.num_queries]
    scores = chunk_sizes.at_once(q.device, _DENSE_ROW_SCORES, _WIDE_DENSE_ROW_SCORES)
    q_block = max(min(scores // (q.shape[1] * layout.num_keys), len(queries)), 1)
    every = torch.arange(layout.num_kv_blocks, dtype=torch.int32, device=q.device)
    table = every.expand(1, 1, -(-len(queries) // q_block), -1)
    none = no_dense_rows(q.device)
    yield queries, BlockLayout(table, q_block, layout.kv_block, layout.mask.of_queries(queries), none)


def all_lists(call: Call) -> Iterator[Lists]:
    """All lists of a call, in runs that follow one another."""
    indices = chunk_sizes.at_once(call.device, _INDICES, _WIDE_INDICES)
    at_once = max(indices // max(call.layout.kv_indices.shape[3], call.M), 1)
    for start in range(0, call.L, at_once):
        yield Lists(call, start, min(start + at_once, call.L))


def _softmax(scores_LMC: Tensor, dtype: torch.dtype, wide: bool) -> tuple[Tensor, Tensor]:
    """The largest score of each query [L, M, 1] and the weights in `dtype`; 0 for a query with nothing to read."""
    most_LM1 = scores_LMC.amax(-1, keepdim=True)
    p_LMC = torch.softmax(scores_LMC, -1, dtype=dtype)
    empty_LM1 = most_LM1 == float("-inf")
    if wide or bool(empty_LM1.any()):  # softmax(−inf) would be NaN
        p_LMC.masked_fill_(empty_LM1, 0.0)
    return most_LM1.to(dtype), p_LMC


blocked_attention = with_gradients("blocked", forward, backward)
