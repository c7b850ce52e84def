"""The `native` backend: native.cpp called by address.

The arithmetic is fp32; for bf16 inputs, products with weights or their gradients are fp16 where the CPU multiplies fp16
(native.cpp).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from lightsparse.kernels.dropout import Dropout, drop_below
from lightsparse.kernels.native import build
from lightsparse.kernels.operator import with_gradients
from lightsparse.kernels.workspace import workspace
from lightsparse.patterns.layout import BlockLayout

_NO_MEMORY = -1  # native.cpp
DTYPES = (torch.float32, torch.bfloat16)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel can be had here; builds it on the first call."""
    return build.library() is not None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float64, device=q.device)
    call = _Call(q, k, v, layout, scale, bias, dropout)
    call.put(out=out, lse=lse)
    call.run(of_backward=False)
    return out, lse


def _backward(
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
    call = _Call(q, k, v, layout, scale, bias, dropout)
    made = torch.empty if q.numel() else torch.zeros  # the walk over no queries writes nothing
    dq, dk, dv = (made(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call.put_rows("dout", "sdo", grad_out)
    call.put(out_saved=out, lse=lse, dq=dq, dk=dk, dv=dv, dlse=None if grad_lse is None else grad_lse.float())
    dbias_BHNK = None
    if bias is not None:
        dbias_BHNK = torch.zeros(*q.shape[:2], *bias.shape[2:])
        call.put(dbias=dbias_BHNK)
    call.run(of_backward=True)
    if bias is None or dbias_BHNK is None:
        return dq, dk, dv, None
    return dq, dk, dv, dbias_BHNK.unflatten(1, (bias.shape[1], -1)).sum(2).sum_to_size(bias.shape).to(bias.dtype)


native_attention = with_gradients("native", _forward, _backward)


class _Call:
    """`Arguments` of one call, and the tensors whose memory they point to."""

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
        if layout.kv_indices.numel() and int(layout.kv_indices.max()) >= layout.num_kv_blocks:
            raise ValueError(  # compiled code would read whatever lies behind the keys
                f"kv_indices names key block {int(layout.kv_indices.max())} and the keys have {layout.num_kv_blocks} "
                f"blocks of {layout.kv_block}; ids count from 0"
            )
        self.of = build.Arguments()
        self.held: list[Tensor] = []
        of, mask, table = self.of, layout.mask, layout.kv_indices
        of.B, of.H, of.Nq, of.D = q.shape
        of.Hkv, of.Nkv = k.shape[1:3]
        of.table_batch, of.table_heads, of.NQ, of.K = table.shape
        of.q_block, of.kv_block = layout.q_block, layout.kv_block
        of.bf16, of.threads, of.scale = q.dtype == torch.bfloat16, torch.get_num_threads(), scale
        for name, strides, x in (("q", "sq", q), ("k", "sk", k), ("v", "sv", v)):
            self.put_rows(name, strides, x)
        of.dense_count = len(layout.dense_rows)
        is_dense = torch.zeros(layout.num_q_blocks, dtype=torch.bool)
        is_dense[layout.dense_rows.long()] = True
        self.put(table=table, dense_row=is_dense)
        for name, stride in _MASK.items():
            held = getattr(mask, name)
            self.put(**{name: None if held is None else held.to(torch.int32)})
            setattr(of, stride, 0 if held is None or held.shape[0] == 1 else held.shape[1])
        if bias is not None:
            per_head = bias.shape[2] * bias.shape[3]
            of.bias_b = 0 if bias.shape[0] == 1 else bias.shape[1] * per_head
            of.bias_h, of.bias_group = per_head, of.H // bias.shape[1]
            self.put(bias=bias.float())
        if dropout is not None:
            of.drop_below, of.keep = drop_below(dropout.rate), 1.0 / (1.0 - dropout.rate)
            self.put(drop_keys=dropout.keys.long())
            self.put(key_ids=None if dropout.key_ids is None else dropout.key_ids.long())

    def put(self, **tensors: Tensor | None) -> None:
        """Addresses of contiguous memory."""
        for name, x in tensors.items():
            if x is not None:
                self.held.append(x.contiguous())
                setattr(self.of, name, self.held[-1].data_ptr())

    def put_rows(self, name: str, strides: str, x: Tensor) -> None:
        """[B, H, N, D] with any strides but the last."""
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        self.held.append(x)
        setattr(self.of, name, x.data_ptr())
        setattr(self.of, strides, (ctypes.c_int64 * 3)(*x.stride()[:3]))

    def run(self, of_backward: bool) -> None:
        library = build.library()
        assert library is not None  # the dispatcher has asked
        size = _checked(library.native_workspace, self.of, of_backward)
        work = workspace().take("native", size // 4 + 16, torch.float32, torch.device("cpu"))
        self.of.work = -(-work.data_ptr() // 64) * 64
        _checked(library.native_run, self.of, of_backward)


def _checked(function: Callable[..., int], arguments: build.Arguments, of_backward: bool) -> int:
    """What a function of the library returns. An exception in it comes as MemoryError or RuntimeError."""
    why = ctypes.create_string_buffer(256)
    result = function(ctypes.byref(arguments), of_backward, why, len(why))
    if result == _NO_MEMORY:
        raise MemoryError("the attention kernel found no memory for its bookkeeping")
    if result < 0:
        raise RuntimeError(f"the attention kernel failed: {why.value.decode(errors='replace')}")
    return result


_MASK = {  # and the field of its stride
    "q_pos": "q_pos_b",
    "visible_from": "from_b",
    "visible_until": "until_b",
    "q_doc": "q_doc_b",
    "kv_doc": "kv_doc_b",
}
