"""Dropout of the residual stream: the right share, off in evaluation, and a function of nothing but its names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightsparse.attention.core import SequenceContext
from lightsparse.models import context_for
from lightsparse.models.dropout import dropped


def context(batch: int, length: int, **fields) -> SequenceContext:
    ids = torch.arange(100, 100 + batch)
    return SequenceContext(positions=torch.arange(length)[None], sample_ids=ids, seed=11, **fields)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_that_is_dropped_and_the_scale_of_the_rest(rate):
    out = dropped(torch.ones(7, 63, 65), rate, 2, context(7, 63))
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.01)
    assert out[kept].unique().item() == pytest.approx(1 / (1 - rate), rel=1e-4)
    for dim in ((0, 1), (0, 2), (1, 2)):  # no feature, token or sample is special
        assert kept.float().mean(dim).sub(1 - rate).abs().max() < 0.15


def test_a_sample_drops_the_same_in_any_batch_and_any_part_of_its_text():
    x, ctx = torch.ones(4, 20, 33), context(4, 20)
    whole = dropped(x, 0.3, 1, ctx)
    alone = dropped(x[2:3], 0.3, 1, replace(ctx, sample_ids=ctx.sample_ids[2:3]))
    assert torch.equal(whole[2:3], alone)
    later = dropped(x[:, 13:], 0.3, 1, replace(ctx, positions=ctx.positions[:, 13:], q_start=13))
    assert torch.equal(whole[:, 13:], later)


def test_sites_passes_and_samples_differ():
    x, ctx = torch.ones(2, 30, 32), context(2, 30)
    first = dropped(x, 0.5, 0, ctx)
    assert not torch.equal(first, dropped(x, 0.5, 1, ctx))
    assert not torch.equal(first, dropped(x, 0.5, 0, replace(ctx, seed=12)))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "none"])
def test_recomputed_and_chunked_layers_drop_the_same(mlp, make_model):
    tokens = torch.arange(42).view(2, 21) % 37
    results = []
    for fields in ({}, {"activation_checkpointing": True}, {"activation_checkpointing": True, "chunk": 5}):
        sizes = {"mlp_dim": None if mlp == "none" else 48}
        model = make_model(mlp=mlp, stream_dropout=0.4, **sizes, **fields)
        output = model.train()(tokens, context_for(tokens, seed=5))
        loss = model.loss_sum(output.hidden, tokens)
        results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for one, other in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_is_off_in_evaluation_and_changes_what_is_trained(make_model):
    tokens = torch.arange(42).view(2, 21) % 37
    plain, dropping = make_model(), make_model(stream_dropout=0.3)
    there, here = (model.eval()(tokens, context_for(tokens)).hidden for model in (plain, dropping))
    assert torch.equal(there, here)
    one, again = (dropping.train()(tokens, context_for(tokens, seed=1)).hidden for _ in range(2))
    assert torch.equal(one, again) and not torch.allclose(one, there)
