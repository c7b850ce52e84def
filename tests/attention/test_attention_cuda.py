"""Every variant on a CUDA device against itself on the CPU; only where there is such a device."""

import copy
from dataclasses import replace

import battery
import pytest
import torch
from torch import Tensor

from lightsparse.attention.core import AttentionCore

# Uneven lengths; `flex` takes tiles of 32 and more and heads of 16 and more, other sizes go to blocked or per_query.
SHAPES = (battery.Shape(333, 2, 4, 2, 32), battery.Shape(111, 1, 2, 1, 64))


def results(core: AttentionCore, given: battery.Inputs, device: str, documents: Tensor | None) -> dict[str, Tensor]:
    """Output, auxiliary loss and the gradients of the inputs and of the core's parameters, on the CPU."""
    core, given = copy.deepcopy(core).to(device), given.leaves().map(lambda t: t.to(device).detach().requires_grad_())
    ctx = battery.context(given.x.shape[1], documents)
    on_device = {
        "positions": ctx.positions.to(device),
        "documents": None if documents is None else documents.to(device),
    }
    result = core(*given.tensors()[:3], x=given.x, ctx=replace(ctx, **on_device))
    weights = torch.randn(result.out.shape, generator=torch.Generator().manual_seed(9)).to(device)
    loss = (result.out * weights).sum() + (0 if result.aux_loss is None else result.aux_loss)
    names = ["q", "k", "v", "x", *(name for name, _ in core.named_parameters())]
    found = torch.autograd.grad(loss, (*given.tensors(), *core.parameters()), allow_unused=True)
    named = {f"the gradient of {name}": grad for name, grad in zip(names, found, strict=True) if grad is not None}
    return {name: x.detach().cpu() for name, x in {"the output": result.out, **named}.items()}


if torch.cuda.is_available():

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("variant", battery.variants(), ids=lambda variant: variant.name)
    def test_on_cuda_output_and_gradients_equal_those_on_the_cpu(variant, shape):
        for causal in variant.directions():
            core, given = variant.core(shape, causal=causal).train(), battery.Inputs.random(shape)
            for documents in (None, battery.documents_at(shape.n, 64, 96, batch=shape.batch)):
                expected = results(core, given, "cpu", documents)
                found = results(core, given, "cuda", documents)
                assert found.keys() == expected.keys()
                for name in expected:
                    battery.close(found[name], expected[name], 1e-4, name)
