"""Learned positions and other MLPs: what a layer is made of by config."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightsparse.models import ModelConfig, context_for
from lightsparse.models.rope import RopeConfig


def test_learned_positions_tell_equal_tokens_apart_and_rope_is_off(make_model):
    model = make_model(positions="learned", context=12).eval()
    tokens = torch.full((1, 12), 3)
    hidden = model(tokens, context_for(tokens)).hidden
    assert not torch.allclose(hidden[0, 0], hidden[0, 5], atol=1e-3)
    model.embed_positions.weight.data.zero_()
    hidden = model(tokens, context_for(tokens)).hidden
    torch.testing.assert_close(hidden[0, 0], hidden[0, 11])  # nothing else knows the place


def test_learned_positions_count_from_the_start_of_a_document(make_model):
    model = make_model(positions="learned", context=12).eval()
    tokens = torch.arange(12)[None] % 6
    documents = torch.tensor([[0] * 6 + [1] * 6], dtype=torch.int32)
    hidden = model(tokens, context_for(tokens, documents)).hidden
    torch.testing.assert_close(hidden[0, :6], hidden[0, 6:], rtol=1e-4, atol=1e-5)


def test_a_longer_text_than_was_learned_is_one_sentence(make_model):
    model = make_model(positions="learned", context=12).eval()
    tokens = torch.zeros(1, 13, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"has 13 tokens, and this model has learned 12 positions; train with"):
        model(tokens, context_for(tokens))
    with pytest.raises(ValueError, match="no context is given"):
        make_model(positions="learned")


def test_learned_positions_decode_as_they_train(make_model):
    model = make_model(positions="learned", context=12).eval()
    tokens = torch.arange(12)[None] * 5 % 37
    whole = model(tokens, context_for(tokens)).hidden
    caches, parts = model.caches(12), []
    for place in range(12):
        step = tokens[:, place : place + 1]
        parts.append(model(step, context_for(step, q_start=place), caches).hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_gelu_mlp_is_up_gelu_down(make_model):
    mlp = make_model(mlp="gelu").layers[0].mlp
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = F.gelu(x @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_without_an_mlp_a_layer_is_attention_alone(make_model):
    model = make_model(mlp="none", mlp_dim=None).eval()
    assert not [name for name, _ in model.named_parameters() if "mlp" in name or "post_attention" in name]
    layer, x = model.layers[0], torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    ctx = context_for(torch.zeros(1, 5, dtype=torch.int64))
    rotation = model.rotary(ctx.positions)
    added, _ = layer.self_attn(layer.input_layernorm(x), rotation, ctx, None)
    torch.testing.assert_close(layer(x, rotation, ctx).x, x + added)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mlp": "relu"}, "model.mlp is 'relu'"),
        ({"mlp": "none", "mlp_dim": 64}, "model.mlp is none; leave mlp_dim out"),
        ({"positions": "none"}, "model.positions is 'none'"),
        ({"positions": "learned", "rope": RopeConfig(base=1e6)}, r"does not read model\.rope"),
        ({"dropout": 1.0}, r"model\.dropout is 1\.0"),
    ],
)
def test_an_impossible_form_is_one_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(depth=2, **fields)


@pytest.mark.parametrize("asked", [0, 1, 5, 20, 42])
def test_few_answers_have_the_loss_and_gradients_of_all_logits(asked, make_model):
    model, tokens = make_model(), torch.arange(42).view(2, 21) % 37
    labels = tokens.roll(-1, 1).flatten()
    labels[torch.randperm(42, generator=torch.Generator().manual_seed(1))[asked:]] = -100
    labels = labels.view(2, 21)
    hidden = model(tokens, context_for(tokens)).hidden
    loss = model.loss_sum(hidden, labels)
    slow = F.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(model.token_losses(hidden, labels).sum(), slow.detach())
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(slow, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
