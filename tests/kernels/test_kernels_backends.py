"""`blocked`, `native` and `per_query` equal `reference`, outputs and all gradients, over everything a layout can be."""

import pytest
import torch
from kernel_cases import (
    Sizes,
    Tables,
    assert_equal_results,
    assert_equals_reference,
    dropout,
    finest,
    fitting,
    inputs,
    random_layout,
    results,
    with_dense_mask,
)

from lightsparse.kernels import Dropout, block_sparse_attention, block_sparse_attention_with_lse, sample_keys
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, Strided

SIZES = [
    Sizes(batch=1, heads=2, kv_heads=2, nq=63, nkv=63, dim=32),
    Sizes(batch=2, heads=4, kv_heads=2, nq=111, nkv=111, dim=64),
    Sizes(batch=2, heads=8, kv_heads=1, nq=63, nkv=63, dim=128),
    Sizes(batch=1, heads=4, kv_heads=2, nq=40, nkv=111, dim=32),
    Sizes(batch=2, heads=2, kv_heads=1, nq=1, nkv=63, dim=32),
]
SMALL = Sizes(dim=16)


@pytest.mark.parametrize("rule", ["causal", "both", "documents", "intervals"])
@pytest.mark.parametrize("table_heads", ["1", "Hkv", "H"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_random_tables(sizes, table_heads, rule, backend):
    heads = {"1": 1, "Hkv": sizes.kv_heads, "H": sizes.heads}[table_heads]
    for seed, batch in enumerate({1, sizes.batch}):
        layout = random_layout(sizes, Tables(batch, heads, 16, 16, most=4, rule=rule, seed=seed))
        assert_equals_reference(backend, inputs(sizes), layout)


@pytest.mark.parametrize("dense_rows", [(), (0,), (1, 3)])
@pytest.mark.parametrize(
    ("q_block", "kv_block"), [(16, 16), (16, 8), (8, 32), (1, 16), (1, 1), (20, 7), (63, 16), (64, 64)]
)
def test_block_sizes_need_neither_be_equal_nor_divide_the_length(q_block, kv_block, dense_rows, backend):
    rows = -(-SMALL.nq // q_block)
    dense = tuple(row for row in dense_rows if row < rows)
    for heads, rule in [(1, "causal"), (2, "intervals"), (4, "documents")]:
        layout = random_layout(SMALL, Tables(2, heads, q_block, kv_block, most=5, dense_rows=dense, rule=rule))
        assert_equals_reference(backend, inputs(SMALL), layout)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        LocalWindow(100) | GlobalTokens(4) | Strided(4),
        BlockDilated((256, 512), (1, 2)),
        GlobalTokens(70) | LocalWindow(1),
    ],
    ids=["mixed", "dilated", "global"],
)
def test_patterns_at_a_thousand_tokens(pattern, packed, causal, backend):
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=1000, nkv=1000, dim=32)
    ids = torch.stack([torch.arange(1000) // 300, torch.arange(1000) // 77]).int() if packed else None
    layout = pattern.layout(1000, block=64, heads=4, kv_heads=2, causal=causal, documents=ids)
    assert_equals_reference(backend, inputs(sizes), layout)


@pytest.mark.parametrize("dense_rows", [(), (1,)])
@pytest.mark.parametrize("table_heads", [1, 2, 4])
@pytest.mark.parametrize(("bias_batch", "bias_heads"), [(1, 1), (1, 2), (2, 4), (2, 1)])
def test_a_block_bias_and_its_gradient(bias_batch, bias_heads, table_heads, dense_rows, backend):
    for batch in (1, 2):
        layout = random_layout(SMALL, Tables(batch, table_heads, 16, 8, most=5, dense_rows=dense_rows))
        bias = torch.randn(bias_batch, bias_heads, *layout.kv_indices.shape[2:]).requires_grad_()
        assert_equals_reference(backend, inputs(SMALL), layout, bias=bias)


@pytest.mark.parametrize("dense_rows", [(), (0, 2)])
@pytest.mark.parametrize("table_heads", [1, 2, 4])
@pytest.mark.parametrize(("mask_batch", "mask_heads"), [(1, 1), (2, 1), (2, 4)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_an_explicit_mask(kind, mask_batch, mask_heads, table_heads, dense_rows):
    generator = torch.Generator().manual_seed(3)
    may_read = torch.rand(mask_batch, mask_heads, 63, 63, generator=generator) < 0.5
    may_read[:, :, 20:24] = False  # rows that it empties
    added = torch.randn(mask_batch, mask_heads, 63, 63, generator=generator).masked_fill(~may_read, float("-inf"))
    layout = random_layout(SMALL, Tables(1, table_heads, 16, 8, most=6, dense_rows=dense_rows, rule="both"))
    masked = with_dense_mask(layout, may_read if kind == "bool" else added)
    found = assert_equals_reference("blocked", inputs(SMALL), masked)
    assert (found["lse"][:, :, 20:24] == float("-inf")).all()


def test_a_row_with_nothing_to_read_is_zero_and_passes_no_gradient_on(backend):
    layout = random_layout(SMALL, Tables(1, 2, 16, 16, most=2, rule="intervals"))
    empty = ~layout.to_dense().any(-1).repeat_interleave(2, 1)
    assert empty.any() and not empty.all()
    bias = torch.randn(1, 1, *layout.kv_indices.shape[2:]).requires_grad_()
    for name in (backend, "reference"):
        found = results(name, inputs(SMALL), layout, bias=bias)
        assert (found["out"][empty] == 0).all() and (found["gradient of q"][empty] == 0).all()
        assert (found["lse"][empty] == float("-inf")).all() and found["lse"][~empty].isfinite().all()
        assert all(x.isfinite().all() for of, x in found.items() if of != "lse")


@pytest.mark.parametrize("dense_rows", [(), (0,)])
def test_a_table_without_entries_reads_nothing_but_its_dense_rows(dense_rows, backend):
    layout = random_layout(SMALL, Tables(1, 1, 16, 16, most=0, dense_rows=dense_rows))
    assert layout.kv_indices.shape[3] == 0
    found = assert_equals_reference(backend, inputs(SMALL), layout)
    assert found["out"][:, :, 16:].abs().max() == 0


def test_a_table_of_padding_only_reads_nothing(backend):
    layout = random_layout(SMALL, Tables(1, 1, 16, 16, most=2))
    layout.kv_indices.fill_(-1)
    found = assert_equals_reference(backend, inputs(SMALL), layout)
    assert all(found[name].abs().max() == 0 for name in found if name != "lse")


@pytest.mark.parametrize("scale", [1.0, 0.03, 3.0])
def test_an_explicit_scale(scale, backend):
    layout = random_layout(SMALL, Tables(1, 2, 16, 8, most=5, dense_rows=(1,)))
    dtype, tolerance = finest(backend)
    assert_equals_reference(
        backend, inputs(SMALL, dtype), layout, scale=scale, tolerance=10 * max(scale, 1.0) * tolerance
    )


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_scores_of_any_size(offset, backend):
    """Softmax and lse subtract the row's maximum first."""
    layout = random_layout(SMALL, Tables(1, 1, 16, 8, most=5, rule="both"))
    dtype, tolerance = finest(backend)
    bias = torch.full((1, 1, *layout.kv_indices.shape[2:]), offset, dtype=dtype).requires_grad_()
    assert_equals_reference(backend, inputs(SMALL, dtype), layout, bias=bias, tolerance=100 * tolerance)


def test_inputs_need_not_be_contiguous(backend):
    layout = random_layout(SMALL, Tables(1, 2, 16, 16, most=3, dense_rows=(1,)))
    plain = inputs(SMALL)
    # [B, N, H, D] in memory, as a projection leaves it; and every second feature of a wider tensor.
    transposed = tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in plain)
    strided = tuple(x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for x in plain)
    wanted = results("reference", plain, layout)
    for given in (transposed, strided):
        assert not any(x.is_contiguous() for x in given)
        assert_equal_results(results(backend, given, layout), wanted, 1e-5)


def test_an_expanded_gradient_of_the_output(backend):
    layout = random_layout(SMALL, Tables(1, 2, 16, 16, most=3))
    grads = []
    for name in (backend, "reference"):
        qkv = inputs(SMALL)
        grads.append(torch.autograd.grad(block_sparse_attention(*qkv, fitting(name, layout), backend=name).sum(), qkv))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_lse_alone_and_of_the_output_alone(backend):
    layout = random_layout(SMALL, Tables(1, 1, 16, 16, most=3))
    layout.kv_indices[:, :, :, 0] = torch.arange(4)  # every query reads itself
    layout = type(layout)(layout.kv_indices[..., :1].contiguous(), 16, 16, layout.mask, layout.dense_rows)
    for of in (0, 1):
        grads = []
        for name in (backend, "reference"):
            qkv = inputs(SMALL, finest(backend)[0])
            result = block_sparse_attention_with_lse(*qkv, fitting(name, layout), backend=name)[of]
            grads.append(torch.autograd.grad(result.square().sum(), qkv[: 3 - of]))
        for found, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(found, wanted, rtol=10 * finest(backend)[1], atol=10 * finest(backend)[1])


def test_merging_by_lse_equals_one_softmax_over_both_parts(backend):
    sizes = Sizes(nq=64, nkv=64, dim=16)
    near, far = LocalWindow(1).layout(64, block=16), LocalWindow(64).layout(64, block=16)
    rest = type(far)(far.kv_indices.clone(), 16, 16, far.mask, far.dense_rows)
    own = torch.arange(4, dtype=torch.int32)[None, None, :, None]
    rest.kv_indices[rest.kv_indices == own] = -1  # own blocks stand last in their rows
    qkv = inputs(sizes, finest(backend)[0])
    fit = [fitting(backend, part) for part in (near, rest)]
    parts = [block_sparse_attention_with_lse(*qkv, part, backend=backend) for part in fit]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    merged = (outs * lses.softmax(0)[..., None]).sum(0)
    whole = block_sparse_attention(*qkv, far, backend="reference")
    tolerance = 10 * finest(backend)[1]
    torch.testing.assert_close(merged, whole, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(
        torch.autograd.grad(merged.square().sum(), qkv), torch.autograd.grad(whole.square().sum(), qkv), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dense_rows", [(), (1,)])
@pytest.mark.parametrize("table_heads", [1, 2, 4])
@pytest.mark.parametrize("rule", ["causal", "documents"])
def test_dropout_drops_the_same_weights_as_the_reference(rule, table_heads, dense_rows, backend):
    layout = random_layout(SMALL, Tables(2, table_heads, 16, 8, most=5, dense_rows=dense_rows, rule=rule))
    found = assert_equals_reference(backend, inputs(SMALL), layout, dropout=dropout(SMALL, 0.4))
    plain = results(backend, inputs(SMALL), layout)
    assert not torch.allclose(found["out"], plain["out"])
    assert torch.equal(found["lse"], plain["lse"])  # it drops weights, not scores


def test_dropout_depends_on_the_sample_alone_and_not_on_the_batch_or_the_tiles(backend):
    qkv = inputs(SMALL)
    coarse, fine = (fitting(backend, LocalWindow(64).layout(63, block=block)) for block in (32, 8))
    keys = sample_keys(5, 1, torch.tensor([10, 11]))
    both = block_sparse_attention(*qkv, coarse, dropout=Dropout(0.3, keys), backend=backend)
    again = block_sparse_attention(*qkv, fine, dropout=Dropout(0.3, keys), backend=backend)
    torch.testing.assert_close(both, again)
    second = block_sparse_attention(*(x[1:] for x in qkv), coarse, dropout=Dropout(0.3, keys[1:]), backend=backend)
    torch.testing.assert_close(both[1:], second)
    other = Dropout(0.3, sample_keys(6, 1, torch.tensor([10, 11])))
    assert not torch.allclose(both, block_sparse_attention(*qkv, coarse, dropout=other, backend=backend))


def test_dropout_has_the_right_expectation(backend):
    sizes = Sizes(batch=256, heads=4, kv_heads=4, nq=16, nkv=16, dim=8)
    q, k, v = (x.detach()[:1].expand(256, -1, -1, -1) for x in inputs(sizes))
    layout = fitting(backend, LocalWindow(16).layout(16, block=16))
    plain = block_sparse_attention(q, k, v, layout, backend=backend)[0]
    dropped = block_sparse_attention(q, k, v, layout, dropout=dropout(sizes, 0.5), backend=backend)
    error = (dropped.mean(0) - plain) / (dropped.std(0) / 16 + 1e-6)
    assert error.abs().max() < 5
    assert error.square().mean() == pytest.approx(1, abs=0.3)
