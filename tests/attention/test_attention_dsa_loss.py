"""What trains DSA's indexer: its divergence and gradients against autograd on the definition, and its choice against
transformers' own indexer of DeepSeek-V3.2."""

from __future__ import annotations

import pytest
import torch
from battery import ROTARY, Inputs, Shape, close, context, documents_at
from dsa_case import make, run, written_out
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from lightsparse.attention.selection import indexer_loss

SHAPES = [Shape(63, 1, 2, 2, 32), Shape(111, 2, 4, 2, 16), Shape(90, 1, 4, 1, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("borders", [(), (5, 37, 38, 61)], ids=["one document", "documents"])
@pytest.mark.parametrize("way", ["dense stage", "gathered", "masked"])
def test_loss_and_gradients_are_those_of_the_definition(shape, borders, way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_loss, "_is_gathered", lambda *given: way == "gathered")
    documents = documents_at(shape.n, *borders, batch=shape.batch) if borders else None
    core = make(shape, 7, torch.float64, dense_steps=-1 if way == "dense stage" else 0, kl_weight=0.5)
    given = Inputs.random(shape, dtype=torch.float64).leaves()
    result, right = run(core, given, documents), written_out(core, given, 7, documents)
    loss, uniform = (right.dense_loss, right.dense_uniform) if way == "dense stage" else (right.loss, right.uniform)
    close(result.aux_loss, 0.5 * loss, 1e-10, "the loss")
    close(result.stats["selection_kl"], loss, 1e-6, "selection_kl")
    close(result.stats["uniform_kl"], uniform, 1e-6, "uniform_kl")
    parameters = list(core.parameters())
    found, wanted = (torch.autograd.grad(of, parameters) for of in (result.aux_loss, 0.5 * loss))
    for (name, _), grad, expected in zip(core.named_parameters(), found, wanted, strict=True):
        close(grad, expected, 1e-10, f"the gradient of {name}")
        assert float(expected.abs().max()) > 1e-6, f"the gradient of {name} tells nothing"


def test_the_loss_reaches_nothing_but_the_indexer() -> None:
    shape = Shape(40, 1, 2, 1, 16)
    core, given = make(shape, 5), Inputs.random(shape).leaves()
    result = run(core, given)
    assert not any(torch.autograd.grad(result.aux_loss, given.tensors(), allow_unused=True, retain_graph=True))
    assert not any(torch.autograd.grad(result.out.sum(), list(core.parameters()), allow_unused=True))


def test_scores_are_fp32_whatever_autocast_and_parameters_say() -> None:
    shape = Shape(63, 1, 2, 1, 32)
    core, given = make(shape, 7), Inputs.random(shape)
    for parameter in core.parameters():  # as bf16 holds them
        parameter.data = parameter.data.bfloat16().float()
    plain = run(core, given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(core, given)
    low = run(core.bfloat16(), given)
    assert torch.equal(mixed.choice, plain.choice) and torch.equal(low.choice, plain.choice)
    assert torch.equal(mixed.aux_loss, plain.aux_loss) and torch.equal(low.aux_loss, plain.aux_loss)


def test_a_recompute_gives_the_same_bits() -> None:
    shape = Shape(111, 2, 4, 2, 16)
    core, given = make(shape, 9), Inputs.random(shape).leaves()

    def everything() -> torch.Tensor:
        result = run(core, given)
        return result.out.square().mean() + result.aux_loss

    of = [*given.tensors()[:3], *core.parameters()]
    plain = torch.autograd.grad(everything(), of)
    again = torch.autograd.grad(checkpoint(everything, use_reentrant=False), of)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_the_choice_is_that_of_transformers_deepseek_v32() -> None:
    """Same weights, same rotation (all dims of the index head); 16 heads, so that no two scores are equal zeros."""
    shape = Shape(75, 2, 4, 2, 16)
    core, given = make(shape, 11, index_heads=16, index_dim=16), Inputs.random(shape)
    theirs = DeepseekV32Indexer(
        DeepseekV32Config(
            hidden_size=64, q_lora_rank=64, index_n_heads=16, index_head_dim=16, index_topk=11, qk_rope_head_dim=16
        ),
        0,
    )
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (theirs.wq_b, core.indexer.query),
        (theirs.wk, core.indexer.key),
        (theirs.weights_proj, core.indexer.weight),
        (theirs.k_norm, core.indexer.key_norm),
    ]
    for own, from_ours in pairs:
        own.load_state_dict(from_ours.state_dict())
    angle = torch.arange(75)[:, None] * ROTARY.config.frequencies(16)[0]
    rotation = tuple(torch.cat([of, of], -1)[None] for of in (angle.cos(), angle.sin()))
    mask = torch.ones(75, 75).tril().bool().expand(2, -1, -1)
    chosen = theirs(given.x, given.x, rotation, mask, torch.arange(75)[None])
    table = core.select(given.q, given.k, given.x, context(75)).layout.kv_indices[:, 0]
    for t in range(11, 75):  # before, theirs fills up with what is not visible
        assert torch.equal(chosen[:, t].sort(-1).values, table[:, t]), t
