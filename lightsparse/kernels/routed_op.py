"""`routed` as one operator. Kept for the backward: inputs, output and log-sum-exp; the scores are computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightsparse.kernels import layout_arguments, routed
from lightsparse.kernels.blocked import sum_dtype
from lightsparse.kernels.dropout import Dropout
from lightsparse.patterns.layout import BlockLayout


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    bias: Tensor | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] in q's dtype and lse [B, H, Nq] in fp32 (fp64 for fp64), both differentiable."""
    return torch.ops.lightsparse.routed(q, k, v, bias, *layout_arguments.flat(layout, dropout), scale)


@torch.library.custom_op(
    "lightsparse::routed",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias, {layout_arguments.SCHEMA}, float scale) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *flat, scale = rest
    layout, dropout = layout_arguments.unflattened(*flat)
    with torch.autocast(q.device.type, enabled=False):  # it would round what is summed in fp32
        return routed.forward(q, k, v, layout, scale, bias, dropout)


@_forward.register_fake
def _(q, k, v, bias, *rest):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=sum_dtype(q), device=q.device)


@torch.library.custom_op(
    "lightsparse::routed_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? bias, "
    f"{layout_arguments.SCHEMA}, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *flat, scale = rest
    layout, dropout = layout_arguments.unflattened(*flat)
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv, dbias = routed.backward(grad_out, grad_lse, out, lse, q, k, v, layout, scale, bias, dropout)
    return dq, dk.contiguous(), dv.contiguous(), q.new_empty(0) if dbias is None else dbias


@_backward.register_fake
def _(grad_out, grad_lse, out, lse, q, k, v, bias, *rest):
    dbias = q.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    return (*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), dbias)


_TENSORS = 4 + layout_arguments.TENSORS  # q, k, v, bias and those of the layout


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.numbers = inputs[_TENSORS:]


def _gradients(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    saved = ctx.saved_tensors  # only once: recomputation hands them out once
    bias = saved[5]
    dq, dk, dv, dbias = torch.ops.lightsparse.routed_backward(grad_out, grad_lse, *saved, *ctx.numbers)
    rest = layout_arguments.TENSORS + layout_arguments.NUMBERS + 1
    return dq, dk, dv, None if bias is None else dbias, *(None for _ in range(rest))


_forward.register_autograd(_gradients, setup_context=_keep)
