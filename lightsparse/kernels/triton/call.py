"""One call of the `triton` backend: which kernels, over which part of the table at a time.

Rows of many queries (tiles), and single queries of 16 heads or more, go by row: each program has its queries' whole
softmax, and dk, dv come by column. Single queries of fewer heads go by column, both ways: the rows that chose a block
meet it in one product, and a row's parts are merged. Names of dimensions: tables.py.

State of the process: `_tables`, rows and columns of each layout in tiles, as long as it lives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightsparse.kernels.compute_dtype import sum_dtype
from lightsparse.kernels.dropout import Dropout, drop_below, key_hashes, row_hashes
from lightsparse.kernels.triton.columns import columns_backward, columns_forward
from lightsparse.kernels.triton.merge import add_segments, merge_outputs, merge_query_gradients
from lightsparse.kernels.triton.rows import rows_backward, rows_forward
from lightsparse.kernels.triton.tables import Columns, Rows, columns_of, rows_of
from lightsparse.kernels.triton.tile_sizes import TileSize, tile_sizes
from lightsparse.patterns.layout import BlockLayout

BY_ROW_FROM = 16  # queries that share a list: the rows of the hardware's smallest product
_SEGMENT = 2048  # rows of a segment, at least: so many are worth a program's start
_PART_BYTES = 1 << 30  # of the parts of rows in memory at once; those of one key/value head may be more
_MERGED = 16  # rows that one program merges

_tables: WeakKeyDictionary[BlockLayout, tuple[Rows, Columns]] = WeakKeyDictionary()


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] in q's dtype and lse [B, H, Nq] in fp64."""
    call = Call(q, k, v, layout, scale, bias, dropout)
    return call.forward_by_row() if call.by_row else call.forward_by_column()


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
    delta = (grad_out.to(call.sum_dtype) * out.to(call.sum_dtype)).sum(-1)
    if grad_lse is not None:  # d lse / d s = p
        delta = delta - grad_lse.to(call.sum_dtype)
    of_outputs = {"grad_out": grad_out.contiguous(), "lse": lse.contiguous(), "delta": delta.contiguous()}
    return call.backward_by_row(of_outputs) if call.by_row else call.backward_by_column(of_outputs)


class Call:
    """Sizes and arguments that forward and backward share."""

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
        self.layout, self.scale, self.bias = layout, scale, bias
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.sum_dtype = sum_dtype(q)
        (self.B, self.H, self.N, self.D), self.Hkv = q.shape, k.shape[1]
        self.U = self.H if layout.kv_indices.shape[1] == self.H else self.Hkv
        self.G, self.NQ, self.J = self.H // self.U, layout.num_q_blocks, max(layout.num_kv_blocks, 1)
        self.M, self.K = layout.q_block * self.G, max(layout.kv_indices.shape[3], 1)
        self.by_row = goes_by_row(layout, self.M)
        extras = bias is not None or dropout is not None
        self.sizes = tile_sizes(_capability(q.device), q.dtype, self.D, layout.kv_block, self.M, extras)
        mask = layout.mask
        documents = mask.q_doc is not None and mask.kv_doc is not None
        opens, closes = torch.broadcast_tensors(mask.visible_from, mask.visible_until)
        self.inputs: dict[str, Any] = {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            **self._of_batch("q_pos", mask.q_pos, "pos_of_b"),
            **self._of_batch("opens", opens, "keys_of_b"),
            **self._of_batch("closes", closes, "keys_of_b"),
            **self._of_batch("q_doc", mask.q_doc if documents else None, "q_doc_of_b"),
            **self._of_batch("kv_doc", mask.kv_doc if documents else None, "kv_doc_of_b"),
            "scale": scale,
            "num_queries": self.N,
            "num_keys": layout.num_keys,
            "NQ": self.NQ,
            "RATIO": self.U // self.Hkv,
            "U": self.U,
            **self._of_rows(),
            "S": layout.kv_block,
            "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" and q.is_cuda else "ieee",
            "DOCUMENTS": documents,
            **self._of_bias(bias),
            **self._of_dropout(dropout),
        }

    # ---- by row -----------------------------------------------------------------------------------------------------

    def forward_by_row(self) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(self.q), self.q.new_empty(self.q.shape[:3], dtype=torch.float64)
        self._run_rows(rows_forward, self.sizes.rows_forward, self.rows_and_columns()[0], out=out, lse=lse)
        return out, lse

    def backward_by_row(self, of_outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        rows, columns = self.rows_and_columns()
        dq, dbias = torch.empty_like(self.q), None
        if self.bias is not None:
            dbias = self.q.new_zeros(self.B * self.U * self.NQ, self.M, self.K, dtype=self.sum_dtype)
        self._run_rows(rows_backward, self.sizes.rows_backward, rows, dq=dq, dbias=dbias, K=self.K, **of_outputs)
        batch, heads = rows.shape
        shared = (self.B // batch, self.U // heads)
        dk, dv = self._key_gradients(self.sizes.columns_backward, columns, rows.shape, shared, of_outputs)
        if self.bias is None or dbias is None:
            return dq, dk, dv, None
        return (
            dq,
            dk,
            dv,
            self._bias_gradient(dbias.view(self.B, self.U, self.NQ, -1, self.G, self.K).sum(3), self.bias),
        )

    def rows_and_columns(self) -> tuple[Rows, Columns]:
        """Of the whole layout; kept for layers and steps that share it."""
        if self.layout not in _tables:
            with torch.inference_mode(False):  # made while evaluating, they serve training too
                rows = rows_of(self.layout)
                columns = columns_of(rows, 0, len(rows.entries), self.J, self._longest(rows))
                if self.layout.q_block == 1:
                    return rows, columns
                _tables[self.layout] = rows, columns
        return _tables[self.layout]

    def _run_rows(self, kernel: Any, size: TileSize, rows: Rows, **given: Any) -> None:
        chunks = triton.cdiv(self.M, size.rows)
        batch, heads = rows.shape
        self._run(
            kernel,
            (self.B * self.U * self.NQ * chunks,),
            size,
            entries=rows.entries,
            row_start=rows.row_start,
            row_count=rows.row_count,
            chunks=chunks,
            table_width=rows.entries.shape[1],
            tables_of_b=heads if batch > 1 else 0,
            tables_of_u=1 if heads > 1 else 0,
            **given,
        )

    # ---- by column --------------------------------------------------------------------------------------------------

    def forward_by_column(self) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(self.q), self.q.new_empty(self.q.shape[:3], dtype=torch.float64)
        size, rows = self.sizes.columns_forward, rows_of(self.layout, (self.B, self.U))
        parts = self.layout.kv_block // size.keys
        for first, stop in self._portions(parts):
            columns = columns_of(rows, first, stop, self.J, self._longest(rows))
            places = (stop - first) * self.NQ * self.K * parts * self.M
            sums = self.q.new_empty(places, self.D, dtype=self.sum_dtype)
            most, total = (sums.new_empty(places) for _ in range(2))
            self._run_columns(
                columns_forward, size, columns, (parts,), first, sums=sums, most=most, total=total, K=self.K
            )
            self._run_merge(
                merge_outputs, rows, first, stop, parts, sums=sums, most=most, total=total, out=out, lse=lse
            )
        return out, lse

    def backward_by_column(self, of_outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        size, rows = self.sizes.columns_backward_dq, rows_of(self.layout, (self.B, self.U))
        parts = self.layout.kv_block // size.keys
        dq, (dk, dv) = torch.empty_like(self.q), (torch.empty_like(x) for x in (self.k, self.v))
        of_bias = []
        for first, stop in self._portions(parts):
            columns = columns_of(rows, first, stop, self.J, self._longest(rows))
            places = (stop - first) * self.NQ * self.K * parts * self.M
            dq_parts = self.q.new_empty(places, self.D, dtype=self.sum_dtype)
            dbias_parts = None if self.bias is None else dq_parts.new_zeros(places)
            self._key_gradients(
                size,
                columns,
                (self.B, self.U),
                (1, 1),
                of_outputs,
                tables=(first, stop),
                dk=dk,
                dv=dv,
                dq_parts=dq_parts,
                dbias_parts=dbias_parts,
            )
            self._run_merge(merge_query_gradients, rows, first, stop, parts, parts=dq_parts, dq=dq, scale=self.scale)
            if dbias_parts is not None:
                of_bias.append(dbias_parts.view(stop - first, self.NQ, self.K, parts, self.G).sum(3).transpose(2, 3))
        if self.bias is None:
            return dq, dk, dv, None
        return dq, dk, dv, self._bias_gradient(torch.cat(of_bias).unflatten(0, (self.B, self.U)), self.bias)

    def _portions(self, parts: int) -> Iterator[tuple[int, int]]:
        """Tables first … stop − 1, those of whole key/value heads."""
        ratio = self.U // self.Hkv
        of_kv_head = ratio * self.NQ * self.K * parts * self.M * self.D * self.sum_dtype.itemsize
        at_once = max(_PART_BYTES // max(of_kv_head, 1), 1) * ratio
        for first in range(0, self.B * self.U, at_once):
            yield first, min(first + at_once, self.B * self.U)

    def _longest(self, rows: Rows) -> int:
        """Entries of a segment, at most: no fewer than the average block has, so that there are not twice as many
        segments as blocks."""
        return max(_SEGMENT // self.M, -(-rows.entries.shape[1] // self.J), 1)

    def _run_columns(
        self, kernel: Any, size: TileSize, columns: Columns, grid: tuple[int, ...], first: int, **given: Any
    ) -> None:
        self._run(
            kernel,
            (len(columns.block), *grid),
            size,
            segment_block=columns.block,
            first_segment=columns.first_segment,
            column_start=columns.start,
            column_row=columns.row,
            column_entry=columns.entry,
            longest=columns.longest,
            J=self.J,
            blocks=len(columns.first_segment) - 1,
            first_table=first,
            **given,
        )

    def _run_merge(self, kernel: Any, rows: Rows, first: int, stop: int, number: int, **given: Any) -> None:
        of_portion = (stop - first) * self.NQ * self.M
        kernel[(triton.cdiv(of_portion, _MERGED),)](
            row_count=rows.row_count[first:stop],
            rows=of_portion,
            num_queries=self.N,
            NQ=self.NQ,
            first_table=first,
            K=self.K,
            PARTS=number,
            BLOCK_R=_MERGED,
            **self._of_rows(),
            **self._of_vectors(),
            **given,
        )

    def _key_gradients(
        self,
        size: TileSize,
        columns: Columns,
        tables_of: tuple[int, int],
        shared: tuple[int, int],
        of_outputs: dict[str, Tensor],
        *,
        tables: tuple[int, int] | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        dq_parts: Tensor | None = None,
        dbias_parts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """dk and dv of the tables first … stop − 1, each shared by so many samples and list heads."""
        (batch, heads), (samples, list_heads) = tables_of, shared
        first, stop = (0, batch * heads) if tables is None else tables
        dk, dv = (torch.empty_like(self.k) if x is None else x for x in (dk, dv))
        repeats, S, parts = samples * list_heads, self.layout.kv_block, self.layout.kv_block // size.keys
        of_segments = (len(columns.block), repeats, S, self.D)
        dk_parts, dv_parts = (self.q.new_empty(of_segments, dtype=self.sum_dtype) for _ in "kv")
        self._run_columns(
            columns_backward,
            size,
            columns,
            (parts * repeats,),
            first,
            dk=dk_parts,
            dv=dv_parts,
            dq_parts=dq_parts,
            dbias_parts=dbias_parts,
            WITH_DQ=dq_parts is not None,
            table_heads=heads,
            repeats=repeats,
            heads_repeated=list_heads,
            K=self.K,
            **of_outputs,
        )
        ratio = self.U // self.Hkv
        first_head, last_head = (0, self.B * self.Hkv) if tables is None else (first // ratio, stop // ratio)
        keys = min(size.keys, 32)
        add_segments[((last_head - first_head) * self.J, triton.cdiv(S, keys))](
            dk_parts=dk_parts,
            dv_parts=dv_parts,
            dk=dk,
            dv=dv,
            first_segment=columns.first_segment,
            scale=self.scale,
            num_keys=self.layout.num_keys,
            J=self.J,
            first_head=first_head,
            first_table=first,
            tables_of_b=heads if batch > 1 or tables is not None else 0,
            tables_of_u=1 if heads > 1 else 0,
            repeats=repeats,
            repeats_of_b=list_heads if samples > 1 else 0,
            repeats_of_u=1 if list_heads > 1 else 0,
            HKV=self.Hkv,
            RATIO=ratio,
            S=S,
            BLOCK_N=keys,
            **self._of_vectors(),
        )
        return dk, dv

    # ---- arguments --------------------------------------------------------------------------------------------------

    def _run(self, kernel: Any, grid: tuple[int, ...], size: TileSize, **given: Any) -> None:
        if not all(grid):
            return
        kernel[grid](
            **self.inputs,
            **given,
            **self._of_vectors(),
            BLOCK_M=size.rows,
            BLOCK_N=size.keys,
            num_warps=size.warps,
            num_stages=size.stages,
        )

    def _of_rows(self) -> dict[str, int]:
        return {"Q": self.layout.q_block, "G": self.G}

    def _of_vectors(self) -> dict[str, Any]:
        acc = tl.float64 if self.sum_dtype == torch.float64 else tl.float32
        return {"D": self.D, "BLOCK_D": max(triton.next_power_of_2(self.D), 16), "ACC": acc}

    def _of_batch(self, name: str, values: Tensor | None, stride: str) -> dict[str, Any]:
        """Numbers [B|1, N] and how far the next sample's are."""
        if values is None:
            return {name: None, stride: 0}
        return {name: values.contiguous(), stride: values.shape[1] if len(values) > 1 else 0}

    def _of_bias(self, bias: Tensor | None) -> dict[str, Any]:
        names = ("bias_of_b", "bias_of_h", "bias_of_row", "bias_heads")
        if bias is None:
            return {"bias": None, "BIAS": False, **dict.fromkeys(names, 0), "bias_heads": 1}
        bias = bias.contiguous()
        batch, heads, rows, width = bias.shape
        strides = (heads * rows * width * (batch > 1), rows * width * (heads > 1), width, self.H // heads)
        return {"bias": bias, "BIAS": True, **dict(zip(names, strides, strict=True))}

    def _of_dropout(self, dropout: Dropout | None) -> dict[str, Any]:
        if dropout is None:
            return {"DROPOUT": False, "row_hash": None, "key_hash": None, "drop_below": 0, "factor": 1.0}
        head = torch.arange(self.H, device=self.q.device)[None, :, None]
        row_hash = row_hashes(dropout.keys[:, None, None], head, self.layout.mask.q_pos[:, None, :])
        key_hash = key_hashes(dropout, torch.arange(self.layout.num_keys, device=self.q.device))
        return {
            "DROPOUT": True,
            "row_hash": row_hash.expand(self.B, -1, -1).contiguous(),
            "key_hash": key_hash,
            "drop_below": drop_below(dropout.rate),
            "factor": 1.0 / (1.0 - dropout.rate),
        }

    def _bias_gradient(self, dbias_BUNGK: Tensor, bias: Tensor) -> Tensor:
        dbias = dbias_BUNGK.transpose(2, 3).flatten(1, 2)[..., : bias.shape[3]].unflatten(1, (bias.shape[1], -1)).sum(2)
        return dbias.sum_to_size(bias.shape).to(bias.dtype)


def goes_by_row(layout: BlockLayout, sharing: int) -> bool:
    """Whether its queries are taken by row, `sharing` of them at once."""
    return layout.q_block > 1 or sharing >= BY_ROW_FROM


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
