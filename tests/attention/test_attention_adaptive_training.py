"""The adaptive core in training: gradients, budget, temperature, what it reports, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from adaptive_case import BORDERS, DIM, HEADS, KV_HEADS, N, context, documents, inputs, make, run, select
from torch import Tensor

from lightsparse.attention.adaptive import AdaptiveConfig, BlockSparseAdaptive
from lightsparse.attention.core import AttentionShape
from lightsparse.kernels import use_backend


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fields", [{}, {"shared": True}, {"gate_bias": False}, {"dropout": 0.2}])
def test_equals_the_reference_with_noise_and_documents_in_output_loss_and_every_gradient(causal, borders, fields):
    core = make(causal=causal, training=True, dtype=torch.float32, **fields)
    qkv = [t.requires_grad_() for t in inputs(dtype=torch.float32)]
    weights = torch.randn(2, HEADS, N, DIM, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("blocked", "reference"):
        with use_backend(backend):
            result = run(core, qkv, context(N, documents(borders)))
            total = (result.out * weights).sum() + result.aux_loss
        results.append([result.out, *torch.autograd.grad(total, [*qkv, *core.parameters()])])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, atol=2e-5, rtol=1e-5)


def test_the_task_alone_gives_every_parameter_and_the_summaries_a_gradient():
    core, qkv = make(training=True, density=None), [t.requires_grad_() for t in inputs()]
    out = run(core, qkv, context()).out
    for name, parameter in core.named_parameters():
        (grad,) = torch.autograd.grad(out.square().sum(), parameter, retain_graph=True)
        assert grad.flatten(1).abs().sum(1).min() > 1e-4 if grad.dim() > 1 else grad.abs().min() > 1e-4, name


@pytest.mark.parametrize("name", ["query", "key", "offset", "theta"])
def test_router_gradients_are_the_slopes_of_the_loss_while_the_choice_stands(name):
    core, qkv = make(training=True), inputs()
    parameter = getattr(core.router, name)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = torch.randn(2, HEADS, N, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss() -> Tensor:
        result = run(core, qkv, context())
        return (result.out * weights).sum() + result.aux_loss

    (grad,) = torch.autograd.grad(loss(), parameter)
    step, values, tables = 1e-6, [], []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
            values.append(float(loss()))
            tables.append(select(core, qkv, context()).layout.kv_indices)
            parameter.sub_(sign * step * direction)
    assert torch.equal(*tables)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((grad * direction).sum()), rel=1e-5)


def test_training_reads_in_the_mean_what_the_budget_holds():
    core, qkv = make(training=True, k_max=99), inputs(batch=1)
    reads = []
    for seed in range(200):
        found = select(core, qkv, context(seed=seed))
        reads.append(float((found.layout.kv_indices >= 0).sum() - KV_HEADS * 10) / (KV_HEADS * 45))
    assert sum(reads) / 200 == pytest.approx(float(found.stats["router_gate"]), abs=0.015)


def test_the_budget_is_a_mean_over_samples_and_pulls_the_gates_to_the_density():
    core, qkv = make(), inputs(batch=3)
    apart = [select(core, [x[b : b + 1] for x in qkv], context()).aux_loss for b in range(3)]
    torch.testing.assert_close(select(core, qkv, context()).aux_loss, torch.stack(apart).mean())
    for density, sign in ((0.02, 1), (0.98, -1)):
        core = make(density=density)
        select(core, qkv, context()).aux_loss.backward()
        assert (core.router.offset.grad * sign > 0).all()


def test_every_parameter_gets_a_gradient_even_where_there_is_nothing_to_choose():
    for fields in ({}, {"density": None}):
        core = make(training=True, **fields)
        result = run(core, inputs(n=5), context(5))
        (result.out.sum() + result.aux_loss).backward()
        assert float(result.aux_loss.detach()) == 0 and all(p.grad is not None for p in core.parameters())


def test_stats_are_what_their_names_say():
    core, qkv = make(training=True), inputs()
    found = select(core, qkv, context())
    stats, table = found.stats, found.layout.kv_indices
    assert not any(value.requires_grad for value in stats.values())
    assert float(stats["density"]) == pytest.approx(found.layout.density(), abs=1e-6)
    heads = [replace(found.layout, kv_indices=table[:, h : h + 1]).density() for h in range(KV_HEADS)]
    assert stats["head_density"].tolist() == pytest.approx(heads)
    assert float(stats["router_capped"]) == pytest.approx(float(((table >= 0).sum(-1) == 4).double().mean()))
    assert 0 < float(stats["router_entropy"]) < math.log(2)
    assert float(stats["router_tau"]) == pytest.approx(float((0.5 * core.router.theta.detach().exp()).mean()))


def test_the_temperature_is_a_function_of_the_step_alone_and_travels_with_the_weights():
    core, qkv = make(tau_start=2.0, tau_end=0.5), inputs()
    taus, choices = [], []
    for step in (0, 50, 100, 0):
        core.set_step(step, 101)
        taus.append(float(core.schedule))
        choices.append(select(core, qkv, context()))
    assert taus == pytest.approx([2.0, 1.0, 0.5, 2.0])
    # A gate reaches ½ at every temperature or at none; what changes is its weight.
    assert torch.equal(choices[0].layout.kv_indices, choices[2].layout.kv_indices)
    assert bool(choices[0].bias.sum() < choices[2].bias.sum())
    core.set_step(100, 101)
    other = make(tau_start=2.0, tau_end=0.5)
    other.load_state_dict(core.state_dict())
    assert float(other.schedule) == 0.5


def test_the_default_starts_near_its_budget():
    shape = AttentionShape(4, 4, 64, 256, context=64 * 64)
    for seed in range(3):
        torch.manual_seed(seed)
        core = BlockSparseAdaptive(AdaptiveConfig(), shape)
        q, k = (torch.randn(1, 4, 4096, 64, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 9))
        assert core.k_max == 13
        assert 0.07 < float(core.select(q, k, q, context(4096)).stats["router_gate"]) < 0.14


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"block": 0}, "attention.block is 0; it must be at least 1"),
        ({"router_dim": 0}, "attention.router_dim is 0; it must be at least 1"),
        ({"k_max": 0}, "attention.k_max is 0; it counts blocks"),
        ({"threshold": 1.0}, "attention.threshold is 1.0; a gate reaches it"),
        ({"tau_end": 0.0}, "attention.tau_end is 0.0; a temperature must be above 0"),
        ({"budget_weight": -1.0}, "attention.budget_weight is -1.0; it must be at least 0"),
        ({"density": None, "k_max": None}, "attention.density and attention.k_max are both null"),
        ({"gate_bias": False, "density": None}, "attention.gate_bias is false and there is no budget loss"),
        ({"k_max": None}, "attention.k_max is null, a share of the context"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**fields)
