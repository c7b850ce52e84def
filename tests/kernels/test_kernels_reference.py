"""`reference` against PyTorch's own attention under a boolean mask, which shares no code with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Sizes, Tables, dropout, inputs, random_layout, results, with_dense_mask

SIZES = [
    Sizes(batch=1, heads=2, kv_heads=2),
    Sizes(heads=4, kv_heads=2, nq=40, nkv=111, dim=16),
    Sizes(heads=8, kv_heads=1, nq=111, nkv=111, dim=8),
]


def dense_attention(q, k, v, allowed, scale, bias=None):
    """PyTorch's attention where every query reads something; its lse by the definition."""
    groups = q.shape[1] // k.shape[1]
    added = torch.zeros(allowed.shape, dtype=q.dtype) if bias is None else bias
    added = added.masked_fill(~allowed, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=groups > 1)
    scores = q @ k.repeat_interleave(groups, 1).mT * scale + added
    return out, scores.logsumexp(-1)


@pytest.mark.parametrize("heads", ["1", "Hkv", "H"])
@pytest.mark.parametrize("rule", ["causal", "both", "documents", "intervals"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_dense_attention_under_the_mask_of_the_layout(sizes, rule, heads):
    table_heads = {"1": 1, "Hkv": sizes.kv_heads, "H": sizes.heads}[heads]
    layout = random_layout(sizes, Tables(sizes.batch, table_heads, 16, 8, most=4, dense_rows=(1,), rule=rule))
    qkv = inputs(sizes, torch.float64)
    found = results("reference", qkv, layout)
    allowed = layout.to_dense()
    allowed = allowed.repeat_interleave(sizes.heads // allowed.shape[1], 1).expand(sizes.batch, -1, -1, -1)
    reads = allowed.any(-1)
    assert reads.any()
    out, lse = dense_attention(*qkv, allowed | ~reads[..., None], 1 / math.sqrt(sizes.dim))
    torch.testing.assert_close(found["out"], out.masked_fill(~reads[..., None], 0.0))
    torch.testing.assert_close(found["lse"], lse.masked_fill(~reads, float("-inf")))
    generator = torch.Generator().manual_seed(7)
    of_out, of_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    of_out, of_lse = of_out * reads[..., None], of_lse * reads
    for name, grad in zip("qkv", torch.autograd.grad((out, lse), qkv, (of_out, of_lse)), strict=True):
        torch.testing.assert_close(found[f"gradient of {name}"], grad)


@pytest.mark.parametrize("bias_heads", [1, 2, 4])
@pytest.mark.parametrize("table_heads", [1, 2, 4])
@pytest.mark.parametrize("bias_batch", [1, 2])
def test_a_block_bias_is_added_to_every_score_of_its_tile(bias_batch, table_heads, bias_heads):
    sizes = Sizes(nq=40, nkv=63, dim=8)
    layout = random_layout(sizes, Tables(2, table_heads, 16, 8, most=4, dense_rows=(1,), rule="both"))
    bias = torch.randn(bias_batch, bias_heads, *layout.kv_indices.shape[2:], dtype=torch.float64)
    q, k, v = inputs(sizes, torch.float64)
    by_hand = torch.zeros(2, 4, 40, 63, dtype=torch.float64)
    allowed = torch.zeros(2, 4, 40, 63, dtype=torch.bool)
    allowed[:, :, 16:32] = True
    for b in range(2):
        for h in range(4):
            for row in range(3):
                for n, block in enumerate(layout.kv_indices[b, h * table_heads // 4, row].tolist()):
                    if block >= 0:
                        tile = (b, h, slice(row * 16, row * 16 + 16), slice(block * 8, block * 8 + 8))
                        by_hand[tile] = bias[b % bias_batch, h * bias_heads // 4, row, n]
                        allowed[tile] = True
    reads = allowed.any(-1, keepdim=True)
    out, _ = dense_attention(q, k, v, allowed | ~reads, 1 / math.sqrt(8), by_hand)
    found = results("reference", (q, k, v), layout, bias=bias.requires_grad_())
    torch.testing.assert_close(found["out"], out.detach() * reads)


@pytest.mark.parametrize("table_heads", [1, 2, 4])
@pytest.mark.parametrize(("mask_batch", "mask_heads"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_an_explicit_mask_narrows_the_layout_and_a_float_one_is_added(kind, mask_batch, mask_heads, table_heads):
    sizes = Sizes(dim=8)
    layout = random_layout(sizes, Tables(2, table_heads, 16, 8, most=8, rule="causal"))
    generator = torch.Generator().manual_seed(3)
    may_read = torch.rand(mask_batch, mask_heads, 63, 63, generator=generator) < 0.7
    added = torch.randn(mask_batch, mask_heads, 63, 63, generator=generator, dtype=torch.float64)
    dense = may_read if kind == "bool" else added.masked_fill(~may_read, float("-inf"))
    allowed = layout.to_dense().repeat_interleave(4 // table_heads, 1) & may_read
    reads = allowed.any(-1, keepdim=True)
    q, k, v = inputs(sizes, torch.float64)
    bias = added.expand(2, 4, -1, -1) if kind == "float" else None
    out, _ = dense_attention(q, k, v, allowed | ~reads, 1 / math.sqrt(8), bias)
    masked = with_dense_mask(layout, dense)
    found = results("reference", (q, k, v), masked)
    torch.testing.assert_close(found["out"], out.detach() * reads)
    read = masked.to_dense()
    assert torch.equal(read.repeat_interleave(4 // read.shape[1], 1), allowed)


def test_dropout_keeps_a_share_of_the_weights_and_scales_them():
    sizes = Sizes(batch=2, heads=4, kv_heads=4, nq=111, nkv=111, dim=111)
    layout = random_layout(sizes, Tables(q_block=111, kv_block=111, most=1, rule="both", seed=1))
    layout.kv_indices.fill_(0)
    q, k, _ = inputs(sizes, torch.float64)
    v = torch.eye(111, dtype=torch.float64).expand(2, 4, 111, 111).clone().requires_grad_()  # the output is the weights
    plain = results("reference", (q, k, v), layout)["out"]
    dropped = results("reference", (q, k, v), layout, dropout=dropout(sizes, 0.3))["out"]
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, plain / 0.7, 0.0))
    assert kept.double().mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / kept.numel()))
    for axis in range(4):  # no line is spared or struck
        shares = kept.double().mean([d for d in range(4) if d != axis])
        assert (shares - 0.7).abs().max() < 5 * math.sqrt(0.21 / (kept.numel() / len(shares)))
