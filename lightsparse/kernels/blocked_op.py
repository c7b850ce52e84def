"""`blocked` as one operator: torch.compile and activation checkpointing see a single node with its own backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightsparse.kernels import blocked, layout_arguments
from lightsparse.kernels.compute_dtype import compute_dtype
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
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, H, Nq, D] and lse [B, H, Nq] (empty unless with_lse), both differentiable."""
    return torch.ops.lightsparse.blocked(q, k, v, bias, *layout_arguments.flat(layout, dropout), scale, with_lse)


@torch.library.custom_op(
    "lightsparse::blocked",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias, {layout_arguments.SCHEMA}, float scale, bool with_lse) "
    "-> (Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *flat, scale, with_lse = rest
    layout, dropout = layout_arguments.unflattened(*flat)
    dtype = compute_dtype(q.dtype, q.device)
    out, lse = blocked.forward(q.to(dtype), k.to(dtype), v.to(dtype), layout, scale, bias, dropout, with_lse)
    return out.to(q.dtype), lse


@_forward.register_fake
def _(q, k, v, bias, *rest):
    with_lse = rest[-1]
    lse = q.new_empty(q.shape[:3] if with_lse else (0,), dtype=blocked.sum_dtype(q))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@torch.library.custom_op(
    "lightsparse::blocked_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, "
    f"{layout_arguments.SCHEMA}, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *flat, scale = rest
    layout, dropout = layout_arguments.unflattened(*flat)
    dtype = compute_dtype(q.dtype, q.device)
    dq, dk, dv, dbias = blocked.backward(
        grad_out.to(dtype), grad_lse, q.to(dtype), k.to(dtype), v.to(dtype), layout, scale, bias, dropout
    )
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in (dq, dk, dv))
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, bias, *rest):
    dbias = q.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    return (*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), dbias)


_TENSORS = 4 + layout_arguments.TENSORS  # q, k, v, bias and those of the layout


def _keep_inputs(ctx, inputs, output) -> None:
    """Kept for the backward: q, k, v, the bias and the small tensors of the layout. The scores are computed again."""
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.numbers = inputs[_TENSORS:-1]


def _gradients(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    with_lse_gradient = grad_lse is not None and grad_lse.numel() > 0
    q, k, v, bias, *layout = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.lightsparse.blocked_backward(
        grad_out, grad_lse if with_lse_gradient else None, q, k, v, bias, *layout, *ctx.numbers
    )
    rest = layout_arguments.TENSORS + layout_arguments.NUMBERS + 2
    return dq, dk, dv, None if bias is None else dbias, *(None for _ in range(rest))


_forward.register_autograd(_gradients, setup_context=_keep_inputs)
