"""Our compressors, the indexer's choice and the softmax with a sink against those of transformers' deepseek_v4.

Its RoPE turns neighbouring channels, ours the two halves of a head: the same under one order of channels.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from battery import ROTARY, Inputs, Shape, close, context
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from lightsparse.attention.core import AttentionShape
from lightsparse.attention.csa import CsaAttention, CsaConfig
from lightsparse.attention.hca import HcaAttention, HcaConfig
from lightsparse.attention.pooling.compressed import CompressedAttention, tokens_of
from lightsparse.attention.pooling.csa_compress import Compressor

N, HEADS, DIM, STRIDES = 87, 4, 16, {"csa": 4, "hca": 8}
HALVES = torch.cat([torch.arange(0, DIM, 2), torch.arange(1, DIM, 2)])  # ours in the order of theirs


def pair(kind: str) -> tuple[CompressedAttention, nn.Module]:
    """Our core and their compressor with the same random weights."""
    config = DeepseekV4Config(
        hidden_size=HEADS * DIM,
        q_lora_rank=HEADS * DIM,  # the query's latent has the size of x, which stands in for it
        head_dim=DIM,
        num_attention_heads=HEADS,
        partial_rotary_factor=1.0,
        compress_rope_theta=10_000.0,
        compress_rates={"compressed_sparse_attention": STRIDES["csa"], "heavily_compressed_attention": STRIDES["hca"]},
        index_n_heads=8,
        index_head_dim=DIM,
        index_topk=5,
        num_hidden_layers=4,
    )
    torch.manual_seed(1)
    theirs = (v4.DeepseekV4CSACompressor if kind == "csa" else v4.DeepseekV4HCACompressor)(config)
    of = AttentionShape(HEADS, 1, DIM, HEADS * DIM)
    ours: CompressedAttention
    if kind == "csa":
        ours = CsaAttention(CsaConfig(window=11, stride=4, top_k=5, index_heads=8, index_dim=DIM, block=8), of)
    else:
        ours = HcaAttention(HcaConfig(window=11, stride=8, block=8), of)
    with torch.no_grad():
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.5)
        nn.init.normal_(ours.sink)
        copy(theirs, ours.compressor)
        if isinstance(ours, CsaAttention):
            copy(theirs.indexer, ours.indexer.compressor)
            ours.indexer.query.weight.copy_(in_halves(theirs.indexer.q_b_proj.weight))
            ours.indexer.weight.weight.copy_(theirs.indexer.scorer.weights_proj.weight)
    return ours.eval(), theirs.eval()


def copy(theirs: nn.Module, ours: Compressor) -> None:
    ours.value.weight.copy_(in_halves(theirs.kv_proj.weight))
    ours.gate.weight.copy_(in_halves(theirs.gate_proj.weight))
    ours.norm.copy_(theirs.kv_norm.weight[HALVES])
    ours.position_bias.copy_(theirs.position_bias.unflatten(1, (-1, DIM))[..., HALVES].transpose(0, 1))


def in_halves(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (-1, DIM))[:, HALVES].flatten(0, 1)


def given() -> Inputs:
    return Inputs.random(Shape(N, 2, HEADS, 1, DIM), seed=3)


def their_entries(theirs: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, 1, S, D] in our order of channels, and what is added to the scores [B, 1, N, S]."""
    keys, bias = theirs(x, x, torch.arange(N).expand(len(x), -1), None, 0)
    return keys[..., HALVES], bias


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_compressed_keys_are_those_of_transformers(kind):
    ours, theirs = pair(kind)
    x = given().x
    keys, _ = their_entries(theirs, x)
    entries = ours.entries(x, torch.float32, context(N))
    assert entries.count == N // STRIDES[kind]
    close(entries.keys, keys, 1e-5, "the keys")
    turned_back = ROTARY.rotated(keys, -torch.arange(0, entries.count * ours.stride, ours.stride)[None])
    close(entries.values, turned_back, 1e-5, "the values, which are keys before they are turned")


def test_gradients_of_compressed_keys_are_those_of_transformers():
    ours, theirs = pair("csa")
    leaves = [given().x.requires_grad_() for _ in range(2)]
    weights = torch.randn(2, 1, N // 4, DIM)
    (ours.entries(leaves[0], torch.float32, context(N)).keys * weights).sum().backward()
    (their_entries(theirs, leaves[1])[0] * weights).sum().backward()
    close(leaves[0].grad, leaves[1].grad, 1e-5, "the gradient of x")
    close(ours.compressor.value.weight.grad, in_halves(theirs.kv_proj.weight.grad), 1e-5, "of the values' matrix")
    close(ours.compressor.gate.weight.grad, in_halves(theirs.gate_proj.weight.grad), 1e-5, "of the gates' matrix")


def test_the_indexer_chooses_what_transformers_chooses():
    ours, theirs = pair("csa")
    x, ctx = given().x, context(N)
    positions = torch.arange(N).expand(2, -1)
    right = theirs.indexer(x, x, positions, None, 0).sort(-1).values
    index, tokens = ours.indexer(x, ctx, {}), tokens_of(given().q, ctx)
    table = ours._layout(index, tokens, ctx).kv_indices[:, 0].sort(-1).values
    assert torch.equal(table.long(), right)
    assert (table < 0).any() and len(table.unique()) > 20  # early queries see few; later ones choose among many


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_window_entries_and_sink_share_the_softmax_of_transformers(kind):
    ours, theirs = pair(kind)
    of = given()
    keys, bias = their_entries(theirs, of.x)
    values = ours.entries(of.x, torch.float32, context(N)).values
    i = torch.arange(N)
    hidden = (i > i[:, None]) | (i <= i[:, None] - 11)
    window = torch.zeros(2, 1, N, N).masked_fill(hidden, -torch.inf)
    layer = SimpleNamespace(num_key_value_groups=HEADS, sinks=ours.sink, training=False)
    right, _ = v4.eager_attention_forward(
        layer,
        of.q,
        torch.cat([of.k, keys], 2),
        torch.cat([of.v, values], 2),
        torch.cat([window, bias], -1),
        scaling=DIM**-0.5,
    )
    found = ours(*of.tensors()[:3], x=of.x, ctx=context(N)).out
    close(found, right.transpose(1, 2), 1e-5, "the output")
