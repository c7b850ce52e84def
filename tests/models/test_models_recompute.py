"""Layers that keep their input only: the same numbers, gradients and memory as promised, whatever the core reads."""

import pytest
import torch
from torch import nn

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult
from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from lightsparse.kernels import compute_dtype
from lightsparse.models.transformer import ModelConfig, Transformer, context_for

VOCAB = 37


class Gated(AttentionCore):
    """Reads its layer's input, has parameters of its own and a loss of its own."""

    Config = AttentionConfig

    def __init__(self, shape):
        super().__init__(AttentionConfig(), shape)
        self.gate = nn.Linear(shape.embed_dim, shape.heads)

    def attend(self, q, k, v, *, x, ctx):
        groups = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        gate = self.gate(x).sigmoid().transpose(1, 2)[..., None]
        loss = gate.float().square().mean() if torch.is_grad_enabled() else None  # as where a loss is dear
        return AttentionResult((out * gate).to(q.dtype), aux_loss=loss, stats={"density": gate.mean()})


def window(shape):
    return SlidingWindowAttention(SlidingWindowConfig(window=11, sinks=2, block=8), shape)


def built(core, *, activation_checkpointing, chunk=1000, **fields):
    torch.manual_seed(0)
    config = ModelConfig(
        depth=2,
        embed_dim=24,
        heads=3,
        kv_heads=1,
        head_dim=8,
        qk_norm=True,
        activation_checkpointing=activation_checkpointing,
        chunk=chunk,
        **fields,
    )
    return Transformer(config, core, vocab_size=VOCAB)


def found(model, tokens, documents=None, bf16=False):
    """Loss, and gradients by name."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output = model(tokens, context_for(tokens, documents))
        loss = model.loss_sum(output.hidden, tokens)
        loss = loss if output.aux_loss is None else loss + 10 * output.aux_loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("core", [Gated, window])
@pytest.mark.parametrize(("batch", "length", "chunk"), [(1, 63, 1000), (1, 63, 10), (2, 37, 10), (3, 5, 1)])
@pytest.mark.parametrize("mlp", ["swiglu", "none"])
def test_losses_and_gradients_are_those_of_a_layer_that_keeps_everything(core, batch, length, chunk, mlp):
    tokens = torch.randint(VOCAB, (batch, length))
    loss, gradients = found(built(core, activation_checkpointing=True, chunk=chunk, mlp=mlp), tokens)
    expected_loss, expected = found(built(core, activation_checkpointing=False, mlp=mlp), tokens)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_packed_documents_stay_apart():
    tokens, documents = torch.randint(VOCAB, (2, 40)), (torch.arange(40) // 13).int().expand(2, -1)
    loss, gradients = found(built(window, activation_checkpointing=True, chunk=16), tokens, documents)
    expected_loss, expected = found(built(window, activation_checkpointing=False), tokens, documents)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_under_autocast_only_rounding_differs(monkeypatch, products):
    monkeypatch.setattr(compute_dtype, "_multiplies_bf16_faster", lambda: products is torch.bfloat16)
    tokens = torch.randint(VOCAB, (2, 37))
    loss, gradients = found(built(window, activation_checkpointing=True, chunk=16), tokens, bf16=True)
    expected_loss, expected = found(built(window, activation_checkpointing=False), tokens, bf16=True)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0.0)
    for name, gradient in expected.items():
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - gradient).norm() <= 0.03 * gradient.norm(), name


def test_where_products_stay_fp32_the_attention_still_gets_bf16(monkeypatch):
    monkeypatch.setattr(compute_dtype, "_multiplies_bf16_faster", lambda: False)
    model, seen = built(window, activation_checkpointing=False), []
    part = model.layers[0].self_attn
    part.core.register_forward_pre_hook(lambda core, given, named: seen.append(given[0].dtype), with_kwargs=True)
    part.q_proj.register_forward_hook(lambda linear, given, out: seen.append(out.dtype))
    found(model, torch.randint(VOCAB, (1, 20)), bf16=True)
    assert seen == [torch.float32, torch.bfloat16]


def test_frozen_parameters_get_no_gradient():
    model = built(window, activation_checkpointing=True)
    model.layers[1].mlp.requires_grad_(False)
    _, gradients = found(model, torch.randint(VOCAB, (1, 20)))
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without == {f"layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_no_tensor_of_the_mlp_or_of_fp32_queries_is_as_long_as_the_sequence(largest_tensor):
    tokens = torch.randint(VOCAB, (1, 512))
    model = built(window, activation_checkpointing=True, chunk=32, mlp_dim=400)
    assert largest_tensor(lambda: found(model, tokens)) <= max(512 * 24, 32 * 400, 400 * 24)
