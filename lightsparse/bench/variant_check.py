"""Is a variant right? Asked before it is timed, as verify.py asks it of a kernel.

At a small odd size the whole core, chosen blocks, pooling and gathers included, is compared with itself on the slow
backend `reference`; at the measured size sampled rows are compared with dense attention under its layout's mask, where
the layout is known before the input and holds the tokens alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.bench import variants
from lightsparse.bench.against_dense import dense
from lightsparse.bench.variants import LayerInputs
from lightsparse.bench.verify import FLOOR, VerificationError, check, sampled_rows
from lightsparse.config.build import AttentionChoice
from lightsparse.kernels import use_backend

SMALL = 363  # tokens: odd, several blocks of the YAMLs' 64 and a ragged one; brute force is quick


def equals_the_reference(name: str, choice: AttentionChoice, shape: AttentionShape, dtype: torch.dtype) -> float:
    """The largest relative error over output and gradients, as configured and scaled down until little is read.

    Raises VerificationError, naming the tensor, when one exceeds twice dense attention's own error plus FLOOR.
    """
    shape = replace(shape, context=SMALL)
    given = variants.layer_inputs(shape, SMALL, dtype)
    limit = 2 * _rounding(given) + FLOOR[dtype]
    largest = 0.0
    for scale, config in (("as configured", choice.config), ("scaled down", choice.config.small())):
        core = variants.build(choice, shape, config)
        found = variants.forward_backward(core, given)
        with use_backend("reference"):
            right = variants.forward_backward(core, given)
        for tensor, expected in right.items():
            error = _relative_error(found[tensor], expected)
            if not error <= limit:  # NaN fails too
                raise VerificationError(
                    f"{name} {scale}, {SMALL} tokens, {dtype}, is wrong: relative error {error:.2g} in {tensor} "
                    f"against backend=reference, rounding gives at most {limit:.2g}; it was not timed"
                )
            largest = max(largest, error)
    return largest


def equals_its_layout(name: str, core: AttentionCore, given: LayerInputs) -> float | None:
    """The largest relative error in sampled rows; None where no layout of the tokens alone is known.

    Raises VerificationError as `check` does.
    """
    seq = given.q.shape[2]
    try:
        layout = core.layout(seq, SequenceContext(torch.arange(seq)[None]), given.q.device)
    except NotImplementedError:
        return None  # chosen from the input, or several layouts
    if layout.num_keys != seq:
        return None  # summaries beside the tokens

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return variants.forward(core, LayerInputs(q, k, v, given.grad, given.x)).out

    rows = sampled_rows(seq, layout.q_block)
    return check(attend, given, layout, rows, f"{name}, {seq} tokens", backward=True)


def _rounding(given: LayerInputs) -> float:
    """The largest relative error of dense attention in the inputs' dtype, output and gradients."""
    results = []
    for dtype in (given.q.dtype, torch.float64):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (given.q, given.k, given.v))
        out = dense(q, k, v)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), given.grad.to(dtype))))
    return max(_relative_error(found, exact) for found, exact in zip(*results, strict=True))


def _relative_error(found: Tensor | None, exact: Tensor | None) -> float:
    if found is None or exact is None:
        return 0.0 if found is exact else float("inf")
    size = exact.double().norm().clamp(min=torch.finfo(torch.float32).tiny)  # of a gradient that is zero
    return float((found.double() - exact.double()).norm() / size)
