"""Every variant under `triton` in Triton's interpreter gives what it gives under `reference`, gradients included."""

from __future__ import annotations

import battery
import pytest
from battery import Inputs, Shape, attend, close, gradients

from lightsparse.kernels import dispatch, use_backend
from lightsparse.kernels.triton import attention

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
SINGLE_KEYS = {"dsa"}  # left to per_query
ELSEWHERE = {"dense"}  # PyTorch's own attention


@pytest.mark.parametrize("variant", battery.variants(), ids=lambda variant: variant.name)
def test_a_variant_equals_the_reference(variant, monkeypatch):
    shape, served = Shape(40, 1, 4, 2, 16), []
    real = attention.triton_attention
    monkeypatch.setattr(attention, "triton_attention", lambda *given: served.append(1) or real(*given))
    monkeypatch.setattr(dispatch, "_backend_of_process", "triton")
    core, given = variant.core(shape), Inputs.random(shape).leaves()
    wanted = [*given.tensors(), *core.parameters()]
    out = attend(core, given)
    found = gradients(out, *wanted)
    assert bool(served) != (variant.name in SINGLE_KEYS | ELSEWHERE)
    with use_backend("reference"):
        slow = attend(core, given)
    close(out, slow, 1e-5, "the output")
    for grad, right in zip(found, gradients(slow, *wanted), strict=True):
        close(grad, right, 1e-5, "a gradient")
