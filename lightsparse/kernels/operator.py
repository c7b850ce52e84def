"""Our kernels as operators: torch.compile and activation checkpointing see one node with its own backward.

Kept for the backward: q, k, v, the bias, the small tensors of layout and dropout, the output and its log-sum-exp. The
scores are computed again. The log-sum-exp is fp64 within: of n equal scores of 1e8 it is 1e8 + log n, which fp32 rounds
to 1e8, and weights exp(score − lse) would then be n times too large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightsparse.kernels import layout_arguments
from lightsparse.kernels.compute_dtype import sum_dtype

# (q, k, v, layout, scale, bias, dropout) → out [B, H, Nq, D] in q's dtype, lse [B, H, Nq] in fp64
Forward = Callable[..., tuple[Tensor, Tensor]]
# (grad_out, grad_lse or None, out, lse, *those of the forward) → gradients of q, k, v and the bias (None without one)
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]

_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor? bias, {layout_arguments.SCHEMA}, float scale"
_TENSORS = 4 + layout_arguments.TENSORS  # of the inputs, the first so many


def has_tangent(x: Tensor) -> bool:
    """Whether torch.func.jvp or torch.autograd.forward_ad differentiates by x: an operator would drop that."""
    return forward_ad.unpack_dual(x).tangent is not None


def refuse_tangents(name: str, *inputs: Tensor | None) -> None:
    """NotImplementedError where a forward-mode derivative is asked of a backend that has none."""
    if not torch.compiler.is_compiling() and any(has_tangent(x) for x in inputs if x is not None):
        raise NotImplementedError(f"backend {name!r} has no forward-mode derivative; use backend=reference")


def with_gradients(name: str, forward: Forward, backward: Backward) -> Forward:
    """The operators lightsparse::<name> and …_backward, as a differentiable function with the forward's arguments.

    Its lse is fp32, fp64 for fp64. It has no forward-mode derivative and raises NotImplementedError where one is asked.
    """

    def arguments(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        q, k, v, bias, *flat, scale = inputs
        layout, dropout = layout_arguments.unflattened(*flat)
        return q, k, v, layout, scale, bias, dropout

    @torch.library.custom_op(f"lightsparse::{name}", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
    def run(*inputs: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs[0].device.type, enabled=False):  # it would round what is summed in fp32
            return forward(*arguments(inputs))

    @run.register_fake
    def _(q, *_):
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float64)

    @torch.library.custom_op(
        f"lightsparse::{name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_INPUTS}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    )
    def run_backward(*given: Any) -> tuple[Tensor, ...]:
        of_outputs, inputs = given[:4], given[4:]
        with torch.autocast(inputs[0].device.type, enabled=False):
            *grads, dbias = backward(*of_outputs, *arguments(inputs))
        return *(grad.contiguous() for grad in grads), inputs[0].new_empty(0) if dbias is None else dbias

    @run_backward.register_fake
    def _(grad_out, grad_lse, out, lse, q, k, v, bias, *_):
        dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
        return *(x.new_empty(x.shape) for x in (q, k, v)), dbias

    def keep(ctx, inputs, output) -> None:
        ctx.save_for_backward(*output, *inputs[:_TENSORS])
        ctx.numbers = inputs[_TENSORS:]

    def gradients(ctx, grad_out: Tensor, grad_lse: Tensor | None):
        saved = ctx.saved_tensors  # only once: recomputation hands them out once
        *grads, dbias = run_backward(grad_out, grad_lse, *saved, *ctx.numbers)
        without_gradient = layout_arguments.TENSORS + layout_arguments.NUMBERS + 1
        return *grads, None if saved[5] is None else dbias, *[None] * without_gradient

    run.register_autograd(gradients, setup_context=keep)

    def attention(q, k, v, layout, scale, bias, dropout):
        refuse_tangents(name, q, k, v, bias)
        out, lse = run(q, k, v, bias, *layout_arguments.flat(layout, dropout), scale)
        return out, lse.to(sum_dtype(q))

    return attention
