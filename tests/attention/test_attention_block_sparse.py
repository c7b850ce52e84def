"""The block-sparse core: one softmax over the union, its weights in block form, density 1 is everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.kernels.weights import to_dense_weights
from lightsparse.patterns import GlobalTokens, LocalWindow

B, H, HKV, D = 2, 4, 2, 8
CONFIG = BlockSparseConfig(
    block=16,
    segment_lengths=(32, 64),
    dilation_rates=(1, 2),
    pattern={"local": LocalWindow(20), "sinks": GlobalTokens(3)},
)


def core(config: BlockSparseConfig = CONFIG, *, causal: bool = True) -> BlockSparseRingDilatedAttention:
    return BlockSparseRingDilatedAttention(config, AttentionShape(H, HKV, D, H * D, causal=causal))


def inputs(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(B, h, n, D, generator=g, dtype=torch.float64).requires_grad_() for h in (H, HKV, HKV)]


def context(n: int, documents: Tensor | None = None) -> SequenceContext:
    return SequenceContext(torch.arange(n)[None], documents)


def written_out(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    scores = q @ k.repeat_interleave(H // HKV, 1).mT / D**0.5
    return scores.masked_fill(~allowed.repeat_interleave(H // allowed.shape[1], 1), float("-inf")).softmax(-1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [63, 111])
def test_the_weights_in_block_form_sum_to_one_and_are_what_forward_uses(n: int, causal: bool, packed: bool) -> None:
    q, k, v = inputs(n)
    documents = torch.tensor([0, 1]).repeat_interleave(torch.tensor([40, n - 40])).int().expand(B, n)
    ctx = context(n, documents if packed else None)
    attention = core(causal=causal)
    weights, layout = attention.attention_weights(q, k, ctx=ctx)
    assert weights.shape[:3] == (B, H, -(-n // 16)) and weights.shape[4:] == (16, 16)
    sums = weights.sum((3, 5)).flatten(2)[:, :, :n]
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-12, rtol=0)

    dense = to_dense_weights(weights, layout)
    allowed = attention.layout(n, ctx, q.device).to_dense()
    torch.testing.assert_close(dense, written_out(q, k, allowed), atol=1e-12, rtol=0)
    out = dense @ v.repeat_interleave(H // HKV, 1)
    right = attention(q, k, v, x=q, ctx=ctx).out
    torch.testing.assert_close(out, right, atol=1e-10, rtol=0)
    for grad, expected in zip(
        torch.autograd.grad((out**2).sum(), (q, k, v)), torch.autograd.grad((right**2).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(grad, expected, atol=1e-9, rtol=0)


def test_the_weights_of_later_queries_are_those_of_the_whole_sequence() -> None:
    n, start = 111, 37
    q, k, _ = inputs(n)
    attention = core()
    whole = to_dense_weights(*attention.attention_weights(q, k, ctx=context(n)))
    ctx = replace(context(n), positions=torch.arange(start, n)[None], q_start=start)
    later = to_dense_weights(*attention.attention_weights(q[:, :, start:], k, ctx=ctx))
    torch.testing.assert_close(later, whole[:, :, start:], atol=1e-12, rtol=0)


def test_density_one_reads_everything_whatever_the_pattern() -> None:
    for pattern in ({}, {"local": LocalWindow(20)}, {"sinks": GlobalTokens(3)}):
        for causal in (True, False):
            attention = core(replace(CONFIG, pattern=pattern, density=1.0), causal=causal)
            allowed = attention.layout(111, context(111), torch.device("cpu")).to_dense()
            everything = torch.ones(111, 111, dtype=torch.bool)
            assert torch.equal(allowed[0, 0], everything.tril() if causal else everything)


def test_a_layout_first_built_while_evaluating_serves_training() -> None:
    n = 95  # a length no other test uses, so that its layout is built here
    q, k, v = inputs(n)
    attention = core()
    with torch.inference_mode():
        evaluated = attention(q, k, v, x=q, ctx=context(n)).out
    out = attention(q, k, v, x=q, ctx=context(n)).out
    out.sum().backward()
    assert torch.equal(out, evaluated) and q.grad is not None and q.grad.any()


def test_segment_lengths_and_dilation_rates_change_the_output() -> None:
    n = 111
    q, k, v = inputs(n)
    narrow = replace(CONFIG, pattern={"local": LocalWindow(2)})
    outs = [
        core(replace(narrow, **change))(q, k, v, x=q, ctx=context(n)).out
        for change in ({}, {"segment_lengths": (32, 96)}, {"dilation_rates": (1, 1)}, {"pattern": {}}, {"block": 32})
    ]
    for i, a in enumerate(outs):
        for b in outs[i + 1 :]:
            assert not torch.allclose(a, b, atol=1e-3)


def test_a_config_that_cannot_be_is_refused_in_one_sentence() -> None:
    for change, sentence in (
        ({"block": 0}, "attention.block is 0"),
        ({"block": 24}, "multiple of the block, 24 tokens"),
        ({"segment_lengths": (32,)}, "same number of entries"),
        ({"segment_lengths": (), "dilation_rates": (), "pattern": {"local": None}}, "are both empty"),
        ({"density": 1.5}, "attention.density is 1.5"),
        ({"density": 0.5, "solve": "stride"}, "no integer fields of that name"),
    ):
        with pytest.raises(ValueError, match=sentence):
            core(replace(CONFIG, **change))
