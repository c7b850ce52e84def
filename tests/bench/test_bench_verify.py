import dataclasses

import pytest
import torch
import torch.nn.functional as F

from lightsparse.bench.choice import pattern_at
from lightsparse.bench.verify import VerificationError, allowed, check, inputs, ours, sampled_rows
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow

SEQ, BLOCK = 300, 32


@pytest.fixture
def layout():
    return pattern_at("mixed", 0.5, SEQ, BLOCK).layout(SEQ, block=BLOCK, heads=4, kv_heads=2)


def checked(attend, layout, dtype=torch.float32, kv_heads=2):
    given = inputs(layout.num_queries, 4, kv_heads, 16, dtype)
    return check(attend, given, layout, sampled_rows(layout.num_queries, BLOCK), "it", backward=True)


def over(layout):
    """Dense attention under the layout's mask: right by definition."""
    mask = layout.to_dense()
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_kernels_and_masked_dense_attention_pass(layout, dtype):
    for backend in ("blocked", "native"):
        assert checked(ours(layout, backend), layout, dtype) < 0.01
    assert checked(over(layout), layout, dtype) < 0.01


class _WrongGradient(torch.autograd.Function):
    """Passes x on, and a gradient that is wrong in the keys of one block."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        wrong = grad.clone()
        wrong[:, :, BLOCK : 2 * BLOCK] = 0
        return wrong


def _one_block_short(layout):
    table = layout.kv_indices.clone()
    table[:, :, 5:, 0] = table[:, :, 5:, 1]  # the first block of late rows is not read
    return over(dataclasses.replace(layout, kv_indices=table))


WRONG = {
    "reads everything": lambda layout: (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ),
    "misses a block": _one_block_short,
    "wrong scale": lambda layout: lambda q, k, v: over(layout)(1.05 * q, k, v),
    "wrong gradient of q": lambda layout: lambda q, k, v: over(layout)(_WrongGradient.apply(q), k, v),
    "wrong gradient of k": lambda layout: lambda q, k, v: over(layout)(q, _WrongGradient.apply(k), v),
    "wrong gradient of v": lambda layout: lambda q, k, v: over(layout)(q, k, _WrongGradient.apply(v)),
    "NaN": lambda layout: lambda q, k, v: over(layout)(q, k, v) * float("nan"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_caught(layout, wrong, dtype):
    with pytest.raises(VerificationError, match="is wrong"):
        checked(WRONG[wrong](layout), layout, dtype)


def _documents():
    documents = torch.zeros(1, SEQ, dtype=torch.int32)
    documents[:, 100:] = 1
    return documents


@pytest.mark.parametrize(
    "of",
    [
        LocalWindow(70).layout(SEQ, block=BLOCK, documents=_documents()),
        BlockDilated((64, 256), (1, 2)).layout(SEQ, block=BLOCK, heads=4),
        (LocalWindow(20) | GlobalTokens(3, trailing=3)).layout(SEQ, block=BLOCK, causal=False),
    ],
    ids=["documents", "heads", "dense rows"],
)
def test_allowed_keys_of_sampled_rows_are_the_rows_of_the_dense_mask(of):
    rows = sampled_rows(SEQ, BLOCK)
    assert torch.equal(allowed(of, rows), of.to_dense()[:, :, rows])


def test_sampled_rows_hold_both_ends_and_a_block_border():
    rows = sampled_rows(1024, 64).tolist()
    assert rows == sorted(set(rows))
    assert {0, 1023, 511, 512} <= set(rows)
