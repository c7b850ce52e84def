"""`blocked` as one operator: torch.compile and activation checkpointing see a single node with its own backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.kernels import blocked
from lightsparse.kernels.compute_dtype import compute_dtype
from lightsparse.kernels.dropout import Dropout
from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.mask import ElementMask


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
    mask = layout.mask
    return torch.ops.lightsparse.blocked(
        q,
        k,
        v,
        bias,
        layout.kv_indices,
        layout.dense_rows,
        mask.q_pos,
        mask.visible_from,
        mask.visible_until,
        mask.q_doc,
        mask.kv_doc,
        None if mask.dense is None else mask.dense.detach(),
        None if dropout is None else dropout.keys,
        None if dropout is None else dropout.key_ids,
        0.0 if dropout is None else dropout.rate,
        scale,
        layout.q_block,
        layout.kv_block,
        with_lse,
    )


@torch.library.custom_op("lightsparse::blocked", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kv_indices: Tensor,
    dense_rows: Tensor,
    q_pos: Tensor,
    visible_from: Tensor,
    visible_until: Tensor,
    q_doc: Tensor | None,
    kv_doc: Tensor | None,
    dense: Tensor | None,
    dropout_keys: Tensor | None,
    dropout_key_ids: Tensor | None,
    rate: float,
    scale: float,
    q_block: int,
    kv_block: int,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    layout = _layout(
        kv_indices, dense_rows, q_pos, visible_from, visible_until, q_doc, kv_doc, dense, q_block, kv_block
    )
    dtype = compute_dtype(q.dtype, q.device)
    dropout = _dropout(rate, dropout_keys, dropout_key_ids)
    out, lse = blocked.forward(q.to(dtype), k.to(dtype), v.to(dtype), layout, scale, bias, dropout, with_lse)
    return out.to(q.dtype), lse


@_forward.register_fake
def _(q, k, v, bias, *rest):
    with_lse = rest[-1]
    lse = q.new_empty(q.shape[:3] if with_lse else (0,), dtype=blocked.sum_dtype(q))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@torch.library.custom_op("lightsparse::blocked_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kv_indices: Tensor,
    dense_rows: Tensor,
    q_pos: Tensor,
    visible_from: Tensor,
    visible_until: Tensor,
    q_doc: Tensor | None,
    kv_doc: Tensor | None,
    dense: Tensor | None,
    dropout_keys: Tensor | None,
    dropout_key_ids: Tensor | None,
    rate: float,
    scale: float,
    q_block: int,
    kv_block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = _layout(
        kv_indices, dense_rows, q_pos, visible_from, visible_until, q_doc, kv_doc, dense, q_block, kv_block
    )
    dtype = compute_dtype(q.dtype, q.device)
    dropout = _dropout(rate, dropout_keys, dropout_key_ids)
    dq, dk, dv, dbias = blocked.backward(
        grad_out.to(dtype), grad_lse, q.to(dtype), k.to(dtype), v.to(dtype), layout, scale, bias, dropout
    )
    dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in (dq, dk, dv))
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, bias, *rest):
    dbias = q.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    return (*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), dbias)


def _keep_inputs(ctx, inputs, output) -> None:
    """Kept for the backward: q, k, v, the bias and the small tensors of the layout. The scores are computed again."""
    ctx.save_for_backward(*inputs[:14])
    ctx.numbers = inputs[14:18]


def _gradients(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    with_lse_gradient = grad_lse is not None and grad_lse.numel() > 0
    q, k, v, bias, *layout = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.lightsparse.blocked_backward(
        grad_out, grad_lse if with_lse_gradient else None, q, k, v, bias, *layout, *ctx.numbers
    )
    return dq, dk, dv, None if bias is None else dbias, *(None for _ in range(15))


_forward.register_autograd(_gradients, setup_context=_keep_inputs)


def _layout(
    table, dense_rows, q_pos, visible_from, visible_until, q_doc, kv_doc, dense, q_block, kv_block
) -> BlockLayout:
    mask = ElementMask(q_pos, visible_from, visible_until, q_doc, kv_doc, dense)
    return BlockLayout(table, q_block, kv_block, mask, dense_rows)


def _dropout(rate: float, keys: Tensor | None, key_ids: Tensor | None) -> Dropout | None:
    return None if keys is None else Dropout(rate, keys, key_ids)
