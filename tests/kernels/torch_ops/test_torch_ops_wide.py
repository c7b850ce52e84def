"""Wide chunks, as on CUDA: the plain PyTorch backends give the reference's numbers, read no value, launch little.

On a CPU they are tried by `chunk_sizes.is_wide`; tensors that have a CUDA device and no memory (FakeTensorMode) show
that no step reads a value, and how many operations a call dispatches at its real length.
"""

import pytest
import torch
from kernel_cases import Sizes, Tables, assert_equals_reference, dropout, inputs, random_layout, results
from torch.nn.functional import scaled_dot_product_attention

from lightsparse.kernels import chunk_sizes
from lightsparse.kernels.torch_ops import lists, per_query
from lightsparse.patterns import BlockLayout, interval_mask
from lightsparse.patterns.layout import no_dense_rows

SIZES = Sizes(dim=16)
WAYS = {"by block": 16, "by query": None}


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(chunk_sizes, "is_wide", lambda device: True)


@pytest.fixture(params=WAYS)
def way(request, wide, monkeypatch) -> str:
    """Every call goes this way, whatever it costs."""
    monkeypatch.setattr(per_query, "queries_per_tile_of_shape", lambda *sizes: WAYS[request.param])
    return request.param


@pytest.mark.parametrize(
    ("rule", "kv_block"), [("causal", 4), ("both", 7), ("documents", 16), ("intervals", 64), ("causal", 256)]
)
@pytest.mark.parametrize("group", [1, 4])
def test_both_ways_equal_the_reference(group, kv_block, rule, way):
    sizes = Sizes(batch=2, heads=8, kv_heads=8 // group, nq=63, nkv=63, dim=32)
    for table_heads in {1, sizes.kv_heads, sizes.heads}:
        layout = random_layout(sizes, Tables(2, table_heads, 1, kv_block, most=5, dense_rows=(3,), rule=rule))
        assert_equals_reference("per_query", inputs(sizes), layout)


@pytest.mark.parametrize("table_heads", [1, 4])
def test_chunks_of_any_width_equal_the_reference_with_bias_and_dropout(table_heads, way, monkeypatch):
    layout = random_layout(SIZES, Tables(2, table_heads, 1, 8, most=5, rule="documents"))
    bias = torch.randn(2, table_heads, *layout.kv_indices.shape[2:]).requires_grad_()
    for parts in (1 << 28, 1 << 13):
        monkeypatch.setattr(per_query, "_WIDE_PARTS", parts)
        monkeypatch.setattr(per_query, "_WIDE_SCORES", parts >> 4)
        monkeypatch.setattr(lists, "_WIDE_NUMBERS", parts)
        assert_equals_reference("per_query", inputs(SIZES), layout, bias=bias, dropout=dropout(SIZES))


@pytest.mark.parametrize("q_block", [1, 16])
def test_blocked_equals_the_reference(q_block, wide):
    layout = random_layout(SIZES, Tables(2, 2, q_block, 8, most=5, dense_rows=(1,), rule="documents"))
    assert_equals_reference("blocked", inputs(SIZES), layout, dropout=dropout(SIZES))


@pytest.mark.parametrize("most", [0, 3])
def test_queries_without_a_block_are_zero_and_pass_no_gradient_on(most, way):
    layout = random_layout(SIZES, Tables(1, 2, 1, 16, most=most))
    layout.kv_indices.fill_(-1)
    found = assert_equals_reference("per_query", inputs(SIZES), layout)
    assert all(x.abs().max() == 0 for name, x in found.items() if name != "lse")


def test_half_precision_is_multiplied_as_it_is_and_stays_within_twice_the_error_of_dense_attention(way, monkeypatch):
    """Head dim 80, so that the scale 1/√D is no power of two and would round q."""
    monkeypatch.setattr(per_query, "_dtype", lambda q: q.dtype)
    sizes = Sizes(batch=1, heads=2, kv_heads=2, nq=96, nkv=96, dim=80)
    blocks = torch.arange(6, dtype=torch.int32).expand(1, 1, 96, 6)
    own = torch.arange(96)[:, None] // 16
    table = torch.where(blocks <= own, blocks, -1).contiguous()
    layout = BlockLayout(table, 1, 16, interval_mask(96), no_dense_rows("cpu"))
    half = inputs(sizes, torch.bfloat16)
    exact = results("reference", tuple(x.detach().double().requires_grad_() for x in half), layout)
    found = results("per_query", half, layout)
    generator = torch.Generator().manual_seed(7)
    of_out, of_lse = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (exact["out"], exact["lse"])
    )
    out = scaled_dot_product_attention(*half, is_causal=True)
    dense = {"out": out.detach()}
    lse = (
        (half[0].float() @ half[1].float().mT * 80**-0.5)
        .masked_fill(~torch.ones(96, 96, dtype=torch.bool).tril(), float("-inf"))
        .logsumexp(-1)
    )
    grads = torch.autograd.grad((out, lse), half, (of_out.to(out.dtype), of_lse.to(lse.dtype)))
    dense |= {f"gradient of {name}": grad for name, grad in zip("qkv", grads, strict=True)}
    for name in dense:
        error, of_dense = ((x[name].double() - exact[name]).norm() for x in (found, dense))
        assert error <= 2 * of_dense, name
