"""The `triton` backend as a differentiable function, and what it refuses."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightsparse.kernels.compute_dtype import sum_dtype
from lightsparse.kernels.dropout import Dropout
from lightsparse.kernels.operator import refuse_tangents, with_gradients
from lightsparse.kernels.triton import call
from lightsparse.patterns.layout import BlockLayout

CAPABILITY = 8  # major, of the oldest GPU that the tile sizes are for
MOST_HEAD_DIM = 256


def refusal(q: Tensor, layout: BlockLayout, kv_heads: int) -> str | None:
    """Why it cannot serve q [B, H, Nq, D] under this layout, or None."""
    interpreted = triton.knobs.runtime.interpret
    if not q.is_cuda and not interpreted:
        return f"runs on CUDA only, and the tensors are on {q.device.type}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < CAPABILITY:
        return f"needs a GPU of compute capability {CAPABILITY}.0 or newer"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) and not interpreted:
        return f"computes in fp32, bf16 and fp16, not in {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > MOST_HEAD_DIM:
        return f"takes head dims up to {MOST_HEAD_DIM}, not {q.shape[-1]}"
    if layout.kv_block % 16:
        return f"takes key blocks in multiples of 16, not of {layout.kv_block}"
    heads = q.shape[1]
    sharing = layout.q_block * (1 if layout.kv_indices.shape[1] == heads else heads // kv_heads)
    if len(layout.dense_rows) and not call.goes_by_row(layout, sharing):
        return "takes no dense rows among rows of single queries"
    return None


_operator = with_gradients("triton", call.forward, call.backward)


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: Tensor | None, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] in q's dtype, lse [B, H, Nq] in fp32 (fp64 for fp64)."""
    if torch.compiler.is_compiling():
        return _operator(q, k, v, layout, scale, bias, dropout)
    refuse_tangents("triton", q, k, v, bias)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _Attention.apply(q, k, v, bias, layout, scale, dropout)
    return out, lse.to(sum_dtype(q))


class _Attention(torch.autograd.Function):
    """The operator without its dispatch, which takes longer than a small kernel, and with the layout as an object."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
        layout, scale, dropout = others
        out, lse = call.forward(q, k, v, layout, scale, bias, dropout)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.others = others
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        layout, scale, dropout = ctx.others
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        with torch.autocast(q.device.type, enabled=False):
            grads = call.backward(grad_out, grad_lse, out, lse, q, k, v, layout, scale, bias, dropout)
        return *grads, None, None, None
