"""The `blocked` backend: plain tensor operations, one query block at a time against all the key blocks it reads.

Exact because one softmax sees a row's whole selection; no online pass is needed. Memory is linear in N: the backward
recomputes the scores, so nothing but q, k and v is kept. The names of dimensions are those of tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lightsparse.kernels.dropout import Dropout
from lightsparse.kernels.plan import Move, Step, held_moves
from lightsparse.kernels.tiles import Pass
from lightsparse.patterns.layout import BlockLayout, no_dense_rows

_DENSE_ROW_SCORES = 1 << 24  # elements of one score tile of rows that read everything


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    bias: Tensor | None,
    dropout: Dropout | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] in q's dtype and lse [B, H, Nq] (empty unless with_lse)."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:3] if with_lse else (0,), float("-inf"), dtype=sum_dtype(q))
    _forward_rows(Pass(q, k, v, layout, scale, bias, dropout), out, lse, with_lse)
    for queries, wide in dense_row_layouts(layout, q):
        part_out, part_lse = forward(q[:, :, queries], k, v, wide, scale, None, dropout, with_lse)
        out[:, :, queries] = part_out
        if with_lse:
            lse[:, :, queries] = part_lse
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    bias: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and, if given, the block bias."""
    grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    run = Pass(q, k, v, layout, scale, bias, dropout)
    sums = _KeyGradients(run)
    grad_bias_ZGNK = None if run.bias_ZGNK is None else torch.zeros_like(run.bias_ZGNK, dtype=sum_dtype(q))
    _backward_rows(run, sums, grad_out, grad_lse, grad_q, grad_bias_ZGNK)
    grad_k, grad_v = sums.result(k.dtype)
    for queries, wide in dense_row_layouts(layout, q):
        part_lse = None if grad_lse is None else grad_lse[:, :, queries]
        part = backward(grad_out[:, :, queries], part_lse, q[:, :, queries], k, v, wide, scale, None, dropout)
        grad_q[:, :, queries] = part[0]
        grad_k, grad_v = grad_k + part[1], grad_v + part[2]
    grad_bias = None
    if bias is not None and grad_bias_ZGNK is not None:
        grad_bias = summed_to(grad_bias_ZGNK.view(*q.shape[:2], *bias.shape[2:]), bias.shape).to(bias.dtype)
    return grad_q, grad_k, grad_v, grad_bias


def _forward_rows(run: Pass, out: Tensor, lse: Tensor, with_lse: bool) -> None:
    out_ZGND = run.split_heads(out)
    lse_ZGN = run.split_heads(lse) if with_lse else None
    for tile in run.tiles(("k.T", "v")):
        keep_ZMS = None if run.dropout is None else run.keep(tile)
        for portion in tile.portions:
            zs = portion.zs
            scores_ZMS = run.fill_scores(tile, portion, run.of_tile(run.q_ZGND, tile, zs))
            if lse_ZGN is not None:
                lse_ZGN[zs, :, tile.queries] = _log_sum_exp(scores_ZMS).unflatten(1, (run.G, -1))
            p_ZMS = run.probabilities(tile, portion)
            if keep_ZMS is not None:
                p_ZMS.mul_(keep_ZMS[zs])
            _multiply(run, p_ZMS, portion.held["v"], out_ZGND[zs, :, tile.queries])


def _backward_rows(
    run: Pass,
    sums: _KeyGradients,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_q: Tensor,
    grad_bias_ZGNK: Tensor | None,
) -> None:
    dout_ZGND, dq_ZGND = run.split_heads(grad_out), run.split_heads(grad_q)
    dlse_ZGN = None if grad_lse is None else run.split_heads(grad_lse)
    for tile in run.tiles(("k.T", "v.T", "k"), sums):
        keep_ZMS = None if run.dropout is None else run.keep(tile)
        for portion in tile.portions:
            zs = portion.zs
            q_ZMD, dout_ZMD = run.of_tile(run.q_ZGND, tile, zs), run.of_tile(dout_ZGND, tile, zs)
            run.fill_scores(tile, portion, q_ZMD)
            p_ZMS = run.probabilities(tile, portion)
            dp_ZMS = run.shaped("dp", *p_ZMS.shape)
            torch.bmm(dout_ZMD, portion.held["v.T"].mT, out=dp_ZMS)
            if keep_ZMS is not None:
                dp_ZMS.mul_(keep_ZMS[zs])
            ds_ZMS = torch.ops.aten._softmax_backward_data.out(dp_ZMS, p_ZMS, -1, p_ZMS.dtype, grad_input=dp_ZMS)
            if dlse_ZGN is not None:  # d lse / d s = p
                dlse_ZM1 = dlse_ZGN[zs, :, tile.queries].reshape(-1, tile.rows, 1)
                ds_ZMS.addcmul_(p_ZMS, dlse_ZM1.to(run.dtype))
            if grad_bias_ZGNK is not None:
                per_block_ZGK = ds_ZMS.view(portion.scores_ZGQKS.shape).sum((2, 4), dtype=grad_bias_ZGNK.dtype)
                grad_bias_ZGNK[zs, :, tile.step.row, : tile.step.width] = per_block_ZGK
            if keep_ZMS is not None:
                p_ZMS.mul_(keep_ZMS[zs])
            _multiply(run, ds_ZMS, portion.held["k"], dq_ZGND[zs, :, tile.queries], run.scale)
            sums.add(zs, ds_ZMS, p_ZMS, q_ZMD, dout_ZMD)


def _multiply(run: Pass, a_ZMS: Tensor, b_ZSD: Tensor, target_ZGND: Tensor, scale: float = 1.0) -> None:
    """target = scale · a @ b, without a copy where the target's memory allows."""
    count, rows = a_ZMS.shape[:2]
    in_place = count * run.G == 1
    result_ZMD = target_ZGND[:, 0] if in_place else run.shaped("product", count, rows, run.dim)
    torch.baddbmm(result_ZMD, a_ZMS, b_ZSD, beta=0, alpha=scale, out=result_ZMD)
    if not in_place:
        target_ZGND.copy_(result_ZMD.view(target_ZGND.shape))


class _KeyGradients:
    """Gradients of keys and values, summed in the slots while a block stays, written back when it leaves."""

    def __init__(self, run: Pass):
        self.run, self.dtype = run, sum_dtype(run.q_ZGND)
        shape, device = run.sources["k"].shape, run.device
        self.totals = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in "kv"]
        self.buffers: list[Tensor] = []
        self.slot_of: list[dict[int, int]] = []

    def follow(self, step: Step) -> None:
        """Write back what leaves, then take the buffer's new form."""
        self._write_back(step.evictions)
        if step.fresh:
            self.buffers = [self.run.slots(name, step.width, self.dtype) for name in ("dk.T", "dv.T")]
            for buffer in self.buffers:
                buffer.mT.zero_()
        self.slot_of = step.slot_of

    def add(self, zs: slice, ds_ZMS: Tensor, p_ZMS: Tensor, q_ZMD: Tensor, dout_ZMD: Tensor) -> None:
        dk_ZDS, dv_ZDS = (buffer[zs].mT for buffer in self.buffers)
        if self.run.dtype == self.dtype:
            dk_ZDS.baddbmm_(q_ZMD.mT, ds_ZMS, alpha=self.run.scale)
            dv_ZDS.baddbmm_(dout_ZMD.mT, p_ZMS)
        else:  # the product comes back in half precision; the sum over rows is kept in fp32
            product = self.run.shaped("key product", *dk_ZDS.shape)
            dk_ZDS.add_(torch.bmm(q_ZMD.mT, ds_ZMS, out=product), alpha=self.run.scale)
            dv_ZDS.add_(torch.bmm(dout_ZMD.mT, p_ZMS, out=product))

    def flush(self) -> None:
        self._write_back(held_moves(self.slot_of))

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gradients of k and v: [B, Hkv, Nkv, D]."""
        run = self.run
        shape = (run.B, run.Hkv, run.blocks * run.kv_block, run.dim)
        grad_k, grad_v = (total.view(shape)[:, :, : run.layout.num_keys].to(dtype) for total in self.totals)
        return grad_k, grad_v

    def _write_back(self, evictions: list[Move]) -> None:
        size = self.run.kv_block
        for t, slot, block, count in evictions:
            for buffer, total in zip(self.buffers, self.totals, strict=True):
                rows = buffer[self.run.z_of[t], slot * size : (slot + count) * size]
                total[self.run.kv_of[t], block * size : (block + count) * size].add_(rows)
                rows.zero_()


def dense_row_layouts(layout: BlockLayout, q: Tensor) -> Iterator[tuple[Tensor, BlockLayout]]:
    """Queries of the rows that read every block, and a layout of their own, in tiles small enough to hold the keys."""
    if not len(layout.dense_rows):
        return
    rows = layout.dense_rows.long()[:, None] * layout.q_block + torch.arange(layout.q_block, device=q.device)
    queries = rows.flatten()[rows.flatten() < layout.num_queries]
    q_block = max(min(_DENSE_ROW_SCORES // (q.shape[0] * q.shape[1] * layout.num_keys), len(queries)), 1)
    every = torch.arange(layout.num_kv_blocks, dtype=torch.int32, device=q.device)
    mask = layout.mask
    wide = BlockLayout(
        every.expand(1, 1, -(-len(queries) // q_block), -1),
        q_block,
        layout.kv_block,
        replace(
            mask,
            q_pos=mask.q_pos[:, queries],
            q_doc=None if mask.q_doc is None else mask.q_doc[:, queries],
            dense=None if mask.dense is None else mask.dense[:, :, queries],
        ),
        no_dense_rows(q.device),
    )
    yield queries, wide


def _log_sum_exp(scores_ZMS: Tensor) -> Tensor:
    """log Σ exp of each row [Z, M], in fp32 (fp64 for fp64); −inf where nothing is read."""
    # The row's largest weight is exp(max − lse): softmax is several times faster than exp here.
    max_ZM = scores_ZMS.amax(-1).to(sum_dtype(scores_ZMS))
    p_ZMS = torch.softmax(scores_ZMS, -1, dtype=max_ZM.dtype)
    lse_ZM = max_ZM - p_ZMS.amax(-1).log()
    return torch.where(max_ZM == float("-inf"), max_ZM, lse_ZM)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums over inputs like x are kept in."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """[B, H, NQ, K] summed to a bias of [B|1, H|Hkv|1, NQ, K]."""
    x = x.unflatten(1, (shape[1], -1)).sum(2)
    return x.sum(0, keepdim=True) if shape[0] == 1 else x
