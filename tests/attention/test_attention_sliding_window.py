"""The learned sink of a window: one more column in the softmax, in output, gradients, decoding and every sum."""

from __future__ import annotations

import battery
import pytest
import torch
from battery import Inputs, Shape, Variant, close, context, documents_at, gradients, variants
from torch import Tensor

WINDOW = next(variant for variant in variants() if variant.name == "sliding_window")
SHAPE = Shape(111, 2, 4, 2, 32)


class WithSink(Variant):
    """The window with a sink that has learned something."""

    def core(self, shape, **fields):
        core = super().core(shape, **{"learned_sink": True, **fields})
        if core.sink is not None:
            with torch.no_grad():
                core.sink.copy_(torch.linspace(-1.0, 2.0, shape.heads))
        return core


SINK = WithSink("sliding_window")


def with_a_column(given: Inputs, sink_H: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the visible keys and the sink, whose column is then dropped."""
    q, (k, v) = given.q, (t.repeat_interleave(given.q.shape[1] // t.shape[1], 1) for t in (given.k, given.v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    column = sink_H[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("borders", [(), (37, 90)])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_a_softmax_with_one_more_column_in_output_and_every_gradient(causal, borders):
    core, given = SINK.core(SHAPE, causal=causal, dtype=torch.float64), Inputs.random(SHAPE, dtype=torch.float64)
    documents, given = documents_at(111, *borders, batch=2) if borders else None, given.leaves()
    ctx = context(111, documents)
    right = with_a_column(given, core.sink, core.layout(111, ctx, torch.device("cpu")).to_dense())
    out = battery.attend(core, given, documents)
    close(out, right, 1e-12, "the output")
    leaves = (*given.tensors()[:3], core.sink)
    for name, grad, wanted in zip("qkvs", gradients(out, *leaves), gradients(right, *leaves), strict=True):
        assert wanted.abs().max() > 1e-3
        close(grad, wanted, 1e-10, f"the gradient of {name}")


def test_a_sink_of_minus_infinity_is_none():
    plain, core, given = WINDOW.core(SHAPE), SINK.core(SHAPE), Inputs.random(SHAPE).leaves()
    with torch.no_grad():
        core.sink.fill_(-torch.inf)
    out, right = (battery.attend(of, given, documents_at(111, 40, batch=2)) for of in (core, plain))
    close(out, right, 1e-6, "the output")
    for grad, wanted in zip(gradients(out, *given.tensors()[:3]), gradients(right, *given.tensors()[:3]), strict=True):
        close(grad, wanted, 1e-6, "a gradient")


def test_a_high_sink_takes_all_the_weight():
    core, given = SINK.core(SHAPE), Inputs.random(SHAPE)
    with torch.no_grad():
        core.sink.copy_(torch.tensor([30.0, -30.0, 30.0, -30.0]))
    size = battery.attend(core, given).abs().amax((0, 2, 3))
    assert size[0] < 1e-6 and size[2] < 1e-6 and size[1] > 1 and size[3] > 1


@pytest.mark.parametrize(
    "property",
    [
        battery.passes_gradcheck,
        battery.rounds_like_dense_in_bf16,
        battery.never_sees_the_future,
        battery.never_sees_the_future_while_training,
        battery.keeps_documents_apart,
        battery.packs_like_separate_documents,
        battery.decodes_token_by_token,
        battery.chooses_again_what_it_chose,
        battery.compiles,
        battery.grows_linearly,
        battery.reports_its_density,
    ],
    ids=lambda check: check.__name__,
)
def test_what_holds_for_the_window_holds_with_a_sink(property):
    property(SINK)


def test_without_the_option_there_is_no_parameter():
    assert not list(WINDOW.core(SHAPE).parameters())
    assert [p.shape for p in SINK.core(SHAPE).parameters()] == [(4,)]
