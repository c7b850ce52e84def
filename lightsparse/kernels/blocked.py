"""The `blocked` backend: plain tensor operations, one query block at a time against all the key blocks it reads.

Exact because one softmax sees a row's whole selection; no online pass is needed. Memory is linear in N: the backward
recomputes the scores, so nothing but q, k and v is kept. Names: Z = batch × heads that walk a table of their own,
M = queries of one tile (with those of the heads that share its keys), S = keys of one tile, D = head dim, T = tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightsparse.kernels.dropout import Dropout, keep_scale
from lightsparse.kernels.slots import Step, steps
from lightsparse.kernels.tile_mask import RowMask, TileMasks
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
    lse = q.new_full(q.shape[:3] if with_lse else (0,), float("-inf"), dtype=_sum_dtype(q))
    _forward_rows(_Pass(q, k, v, layout, scale, bias, dropout), out, lse, with_lse)
    for queries, wide in _dense_row_layouts(layout, q, k):
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
    run = _Pass(q, k, v, layout, scale, bias, dropout)
    sums = _KeyGradients(run)
    grad_bias = None if bias is None else bias.new_zeros(len(q), q.shape[1], *bias.shape[2:], dtype=_sum_dtype(q))
    _backward_rows(run, sums, grad_out, grad_lse, grad_q, grad_bias)
    grad_k, grad_v = sums.result()
    for queries, wide in _dense_row_layouts(layout, q, k):
        part_lse = None if grad_lse is None else grad_lse[:, :, queries]
        part = backward(grad_out[:, :, queries], part_lse, q[:, :, queries], k, v, wide, scale, None, dropout)
        grad_q[:, :, queries] = part[0]
        grad_k, grad_v = grad_k + part[1], grad_v + part[2]
    if bias is not None and grad_bias is not None:
        grad_bias = _summed_to(grad_bias, bias.shape).to(bias.dtype)
    return grad_q, grad_k, grad_v, grad_bias


def _forward_rows(run: _Pass, out: Tensor, lse: Tensor, with_lse: bool) -> None:
    out_ZGND, tile_out = run.split_heads(out), run.buffer(run.max_rows * run.dim)
    for tile in run.tiles():
        scores_ZMS = run.scores(tile)
        p_ZMS, empty_ZM = run.probabilities(tile, scores_ZMS)
        if with_lse:
            run.split_heads(lse)[:, :, tile.queries] = tile.split(_log_sum_exp(scores_ZMS, empty_ZM))
        if run.dropout is not None:
            p_ZMS.mul_(run.keep(tile))
        tile_ZMD = torch.bmm(p_ZMS, run.values(tile), out=run.shaped(tile_out, p_ZMS.shape[1], run.dim))
        out_ZGND[:, :, tile.queries] = tile.split(tile_ZMD)


def _backward_rows(
    run: _Pass, sums: _KeyGradients, grad_out: Tensor, grad_lse: Tensor | None, grad_q: Tensor, grad_bias: Tensor | None
) -> None:
    dout_ZGND, dq_ZGND = run.split_heads(grad_out.contiguous()), run.split_heads(grad_q)
    dlse_ZGN = None if grad_lse is None else run.split_heads(grad_lse.contiguous())
    score_size = run.max_rows * run.max_width * run.kv_block
    dp_buffer, ds_buffer, dq_buffer = run.buffer(score_size), run.buffer(score_size), run.buffer(run.max_rows * run.dim)
    for tile in run.tiles(sums):
        p_ZMS, _ = run.probabilities(tile, run.scores(tile))
        rows, keys = p_ZMS.shape[1:]
        dout_ZMD = dout_ZGND[:, :, tile.queries].reshape(run.Z, rows, run.dim)
        dp_ZMS = torch.bmm(dout_ZMD, run.values(tile).transpose(1, 2), out=run.shaped(dp_buffer, rows, keys))
        keep_ZMS = None if run.dropout is None else run.keep(tile)
        if keep_ZMS is not None:
            dp_ZMS.mul_(keep_ZMS)
        ds_ZMS = run.shaped(ds_buffer, rows, keys)
        torch.ops.aten._softmax_backward_data.out(dp_ZMS, p_ZMS, -1, p_ZMS.dtype, grad_input=ds_ZMS)
        if dlse_ZGN is not None:  # d lse / d s = p
            dlse_ZM = dlse_ZGN[:, :, tile.queries].reshape(run.Z, rows, 1)
            ds_ZMS.add_(p_ZMS * dlse_ZM.to(p_ZMS.dtype))
        if grad_bias is not None:
            per_block = tile.by_block(ds_ZMS).sum((3, 5), dtype=grad_bias.dtype)
            grad_bias[:, :, tile.step.row, : tile.step.width] = per_block.flatten(1, 2)
        if keep_ZMS is not None:
            p_ZMS.mul_(keep_ZMS)
        dq_ZMD = run.shaped(dq_buffer, rows, run.dim)
        torch.baddbmm(dq_ZMD, ds_ZMS, run.keys(tile), beta=0, alpha=run.scale, out=dq_ZMD)
        dq_ZGND[:, :, tile.queries] = tile.split(dq_ZMD)
        sums.add(tile, ds_ZMS, p_ZMS, dout_ZMD)


@dataclass
class _Tile:
    """One row of the table: its queries against the keys in the buffer."""

    step: Step
    queries: slice
    q_ZMD: Tensor
    shape: tuple[int, int, int, int]  # B, heads of Z, G, queries
    kv_block: int

    def split(self, rows: Tensor) -> Tensor:
        """[Z, M, …] → [Z, G, queries, …]"""
        _, _, g, n = self.shape
        return rows.unflatten(1, (g, n))

    def by_block(self, scores_ZMS: Tensor) -> Tensor:
        """[Z, M, S] → [B, heads of Z, G, queries, slots, kv_block]"""
        return scores_ZMS.view(*self.shape, self.step.width, self.kv_block)


class _Pass:
    """What forward and backward share: the walk over the rows, the buffers of gathered keys, masked scores."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        bias: Tensor | None,
        dropout: Dropout | None,
    ):
        self.B, self.H, _, self.dim = q.shape
        self.Hkv, table_heads = k.shape[1], layout.kv_indices.shape[1]
        self.layout, self.scale, self.dropout = layout, scale, dropout
        # Query heads of one group share gathered keys, unless every query head has a table of its own.
        self.Hz = self.H if table_heads == self.H else self.Hkv
        self.G, self.Z = self.H // self.Hz, self.B * self.Hz
        self.q_ZGND = self.split_heads(q)
        self.kv_block, self.blocks = layout.kv_block, layout.num_kv_blocks
        self.k_blocks, self.v_blocks = (self._blocks_of(x) for x in (k, v))

        batch = layout.full_tiles.shape[0]
        table_TNK = layout.kv_indices.expand(batch, -1, -1, -1).flatten(0, 1)
        self.masks = TileMasks(layout, table_TNK, q.dtype)
        self.table_heads, self.tables = (
            table_heads,
            [[[j for j in row if j >= 0] for row in table] for table in table_TNK.tolist()],
        )
        self.max_width = max((len(row) for table in self.tables for row in table), default=0)
        self.max_rows = self.Z * self.G * min(layout.q_block, layout.num_queries)
        z = torch.arange(self.Z, device=q.device).view(self.B, self.Hz)
        by_table = z.view(batch, self.B // batch, table_heads, self.Hz // table_heads).permute(0, 2, 1, 3)
        self.z_of_table = by_table.reshape(len(self.tables), -1)
        self.kv_of_z = (z // self.Hz * self.Hkv + z % self.Hz // (self.Hz // self.Hkv)).flatten()
        self.bias_BHNK = None
        if bias is not None:
            self.bias_BHNK = bias.repeat_interleave(self.H // bias.shape[1], 1).expand(self.B, -1, -1, -1)

        self.k_buffer, self.v_buffer = (
            self.buffer(self.Z * self.max_width * self.kv_block * self.dim).zero_() for _ in "kv"
        )
        self.score_buffer, self.p_buffer = (self.buffer(self.max_rows * self.max_width * self.kv_block) for _ in "sp")

    def tiles(self, sums: _KeyGradients | None = None) -> Iterator[_Tile]:
        """Rows with something to read, keys and values loaded. `sums` follows the moves of the blocks."""
        n = self.layout.num_queries
        for step in steps(self.tables, reuse=self.bias_BHNK is None):
            if sums is not None:
                sums.follow(step)
            if step.width == 0:
                continue
            start = step.row * self.layout.q_block
            queries = slice(start, min(start + self.layout.q_block, n))
            count = queries.stop - queries.start
            tile = _Tile(
                step,
                queries,
                self.q_ZGND[:, :, queries].reshape(self.Z, -1, self.dim),
                (self.B, self.Hz, self.G, count),
                self.kv_block,
            )
            slots, blocks = self.flat(step.loads, step.width)
            for buffer, source in ((self.keys(tile), self.k_blocks), (self.values(tile), self.v_blocks)):
                buffer.view(-1, self.kv_block * self.dim).index_copy_(0, slots, source.index_select(0, blocks))
            yield tile
        if sums is not None:
            sums.flush()

    def scores(self, tile: _Tile) -> Tensor:
        """Masked, scaled scores [Z, M, S]; −inf where a query may not read."""
        rows, width = tile.q_ZMD.shape[1], tile.step.width
        scores = self.shaped(self.score_buffer, rows, width * self.kv_block)
        torch.baddbmm(scores, tile.q_ZMD, self.keys(tile).transpose(1, 2), beta=0, alpha=self.scale, out=scores)
        view = tile.by_block(scores)
        if self.bias_BHNK is not None:
            bias = self.bias_BHNK[:, :, tile.step.row, :width].reshape(self.B, self.Hz, self.G, 1, width, 1)
            view.add_(bias.to(view.dtype))
        for t, block, bias_QK in self.row_mask(tile).tiles:
            slot = tile.step.slot_of[t][block]
            view[*self._of_table(t), :, :, slot].add_(bias_QK[: tile.shape[3]])
        for t, held in enumerate(tile.step.slot_of):
            if len(held) < width:  # another table's row is wider
                unused = sorted(set(range(width)) - set(held.values()))
                view[*self._of_table(t)][..., unused, :] = float("-inf")
        if self.layout.mask.dense is not None:
            view.add_(self._dense_mask(tile))
        return scores

    def probabilities(self, tile: _Tile, scores_ZMS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Softmax over the row's whole selection (in fp32 inside), and which rows have nothing to read, if any may."""
        p = torch.softmax(scores_ZMS, -1, out=self.shaped(self.p_buffer, *scores_ZMS.shape[1:]))
        if not (self.row_mask(tile).may_be_empty or self.layout.mask.dense is not None):
            return p, None
        # A row with no visible key would be softmax(−inf) = NaN; by definition it is zero.
        empty_ZM = scores_ZMS.amax(-1) == float("-inf")
        return p.masked_fill_(empty_ZM[..., None], 0.0), empty_ZM

    def keep(self, tile: _Tile) -> Tensor:
        """Dropout's 0 or 1 / (1 − rate) for each weight of the tile: [Z, M, S]."""
        assert self.dropout is not None
        keys_TS = self._key_numbers(tile).view(-1, self.table_heads, tile.step.width * self.kv_block)
        keys_BHS = keys_TS.repeat_interleave(self.H // self.table_heads, 1)
        positions = self.layout.mask.q_pos[:, tile.queries]
        heads = torch.arange(self.H, device=positions.device)
        return keep_scale(self.dropout, heads, positions, keys_BHS, tile.q_ZMD.dtype).reshape(
            self.Z, -1, keys_BHS.shape[-1]
        )

    def row_mask(self, tile: _Tile) -> RowMask:
        return self.masks.row(tile.step.row)

    def keys(self, tile: _Tile) -> Tensor:
        return self.shaped(self.k_buffer, tile.step.width * self.kv_block, self.dim)

    def values(self, tile: _Tile) -> Tensor:
        return self.shaped(self.v_buffer, tile.step.width * self.kv_block, self.dim)

    def flat(self, moves: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(table, slot, block) triples → rows of the slot buffer [Z · width, …] and of the key blocks."""
        t, slot, block = moves.to(self.z_of_table.device)
        z = self.z_of_table[t]
        return (z * width + slot[:, None]).flatten(), (self.kv_of_z[z] * self.blocks + block[:, None]).flatten()

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, H, N, …] → [Z, G, N, …]"""
        return x.reshape(self.Z, self.G, *x.shape[2:])

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.q_ZGND.dtype, device=self.q_ZGND.device)

    def shaped(self, buffer: Tensor, rows: int, columns: int) -> Tensor:
        """The front of a flat buffer as [Z, rows, columns]: contiguous, as the matmul libraries want it."""
        return buffer[: self.Z * rows * columns].view(self.Z, rows, columns)

    def _blocks_of(self, x: Tensor) -> Tensor:
        """[B, Hkv, N, D] → [B · Hkv · blocks, kv_block · D], padded with zeros."""
        missing = self.blocks * self.kv_block - x.shape[2]
        x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
        return x.view(-1, self.kv_block * self.dim)

    def _of_table(self, t: int) -> tuple[slice | int, slice | int]:
        """Index of table t's part in [B, heads of Z, …]."""
        sample, head = divmod(t, self.table_heads)
        of_batch = len(self.tables) > self.table_heads
        return (sample if of_batch else slice(None), head if self.table_heads > 1 else slice(None))

    def _key_numbers(self, tile: _Tile) -> Tensor:
        """The key that stands in each column of the tile: int64 [T, S]."""
        block_of = [{slot: block for block, slot in held.items()} for held in tile.step.slot_of]
        blocks = torch.tensor([[of.get(slot, 0) for slot in range(tile.step.width)] for of in block_of])
        within = torch.arange(self.kv_block)
        return (blocks[..., None] * self.kv_block + within).flatten(1).to(self.z_of_table.device)

    def _dense_mask(self, tile: _Tile) -> Tensor:
        """The explicit mask of the tile, as something to add: [B|1, heads of Z|1, G|1, queries, slots, kv_block]."""
        dense = self.layout.mask.dense
        assert dense is not None
        rows = dense[:, :, tile.queries]
        if rows.dtype == torch.bool:
            rows = torch.zeros(rows.shape, device=rows.device).masked_fill_(~rows, float("-inf"))
        keys_THS = self._key_numbers(tile).view(-1, self.table_heads, tile.step.width * self.kv_block)
        keys_BHS = keys_THS.clamp(max=self.layout.num_keys - 1).repeat_interleave(self.H // self.table_heads, 1)
        rows = rows.expand(self.B, self.H, -1, -1)
        picked = rows.gather(3, keys_BHS[:, :, None].expand(self.B, self.H, rows.shape[2], -1))
        return tile.by_block(picked.reshape(self.Z, -1, picked.shape[-1])).to(tile.q_ZMD.dtype)


class _KeyGradients:
    """Gradients of keys and values, summed in the slots while a block stays, written back when it leaves."""

    def __init__(self, run: _Pass):
        self.run, dtype = run, _sum_dtype(run.k_blocks)
        self.dk_blocks, self.dv_blocks = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (run.k_blocks, run.v_blocks)
        )
        size = run.Z * run.max_width * run.kv_block * run.dim
        self.dk_buffer, self.dv_buffer = (torch.zeros(size, dtype=dtype, device=run.k_blocks.device) for _ in "kv")
        self.scratch = None if dtype == run.k_blocks.dtype else run.buffer(size)
        self.step: Step | None = None
        self.live: dict[tuple[int, int], int] = {}

    def follow(self, step: Step) -> None:
        """Write back what leaves, then take the buffer's new form."""
        if self.step is not None and self.width:
            self._write_back(step.evictions)
        if step.fresh:
            self.dk_buffer.zero_()
            self.dv_buffer.zero_()
        self.step, self.width = step, step.width

    def add(self, tile: _Tile, ds_ZMS: Tensor, p_ZMS: Tensor, dout_ZMD: Tensor) -> None:
        run, keys = self.run, ds_ZMS.shape[2]
        dk, dv = (run.shaped(b, keys, run.dim) for b in (self.dk_buffer, self.dv_buffer))
        if self.scratch is None:
            dk.baddbmm_(ds_ZMS.transpose(1, 2), tile.q_ZMD, alpha=run.scale)
            dv.baddbmm_(p_ZMS.transpose(1, 2), dout_ZMD)
        else:  # the product comes back in half precision; the sum over rows is kept in fp32
            product = run.shaped(self.scratch, keys, run.dim)
            dk.add_(torch.bmm(ds_ZMS.transpose(1, 2), tile.q_ZMD, out=product), alpha=run.scale)
            dv.add_(torch.bmm(p_ZMS.transpose(1, 2), dout_ZMD, out=product))

    def flush(self) -> None:
        if self.step is not None and self.width:
            held = [(t, slot, block) for t, of in enumerate(self.step.slot_of) for block, slot in of.items()]
            self._write_back(torch.tensor(held, dtype=torch.int64).reshape(-1, 3).t())

    def result(self) -> tuple[Tensor, Tensor]:
        """Gradients of k and v: [B, Hkv, Nkv, D] in their dtype."""
        run = self.run
        shape = (run.B, run.Hkv, run.blocks * run.kv_block, run.dim)
        return tuple(  # type: ignore[return-value]
            x.view(shape)[:, :, : run.layout.num_keys].to(run.k_blocks.dtype) for x in (self.dk_blocks, self.dv_blocks)
        )

    def _write_back(self, evictions: Tensor) -> None:
        run = self.run
        slots, blocks = run.flat(evictions, self.width)
        for buffer, total in ((self.dk_buffer, self.dk_blocks), (self.dv_buffer, self.dv_blocks)):
            rows = run.shaped(buffer, self.width * run.kv_block, run.dim).view(-1, run.kv_block * run.dim)
            total.index_add_(0, blocks, rows.index_select(0, slots))
            rows.index_fill_(0, slots, 0.0)


def _dense_row_layouts(layout: BlockLayout, q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, BlockLayout]]:
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


def _log_sum_exp(scores_ZMS: Tensor, empty_ZM: Tensor | None) -> Tensor:
    """lse = s_max − log p_max: the row's largest weight is exp(s_max − lse). In fp32 (fp64 for fp64)."""
    p = torch.softmax(scores_ZMS, -1, dtype=_sum_dtype(scores_ZMS))
    lse = scores_ZMS.amax(-1).to(p.dtype) - p.amax(-1).log()
    return lse if empty_ZM is None else lse.masked_fill(empty_ZM, float("-inf"))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def _summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """[B, H, NQ, K] summed to a bias of [B|1, H|Hkv|1, NQ, K]."""
    x = x.unflatten(1, (shape[1], -1)).sum(2)
    return x.sum(0, keepdim=True) if shape[0] == 1 else x
