"""Gradients to the last digit in fp64, errors in bf16 next to those of PyTorch's own attention, repeatable bits."""

import pytest
import torch
from kernel_cases import Sizes, Tables, dropout, fitting, inputs, random_layout, results, with_dense_mask
from torch.nn.functional import scaled_dot_product_attention

from lightsparse.kernels import block_sparse_attention, block_sparse_attention_with_lse
from lightsparse.patterns import GlobalTokens, LocalWindow

TINY = Sizes(batch=1, heads=4, kv_heads=2, nq=3, nkv=4, dim=2)


@pytest.mark.parametrize(
    ("extra", "backend"),
    [
        (extra, of)
        for extra in ("plain", "bias", "dropout", "mask", "per head")
        for of in ("blocked", "per_query")
        if (extra, of) != ("mask", "per_query")
    ],
)
def test_gradients_are_those_of_finite_differences(extra, backend):
    tables = Tables(1, 4 if extra == "per head" else 2, 1 if backend == "per_query" else 2, 3, most=2, dense_rows=(1,))
    layout = random_layout(TINY, tables)
    if extra == "mask":
        layout = with_dense_mask(layout, torch.randn(1, 4, 3, 4, dtype=torch.float64))
    qkv = inputs(TINY, torch.float64)
    bias = torch.randn(1, 2, *layout.kv_indices.shape[2:], dtype=torch.float64, requires_grad=True)
    empty = ~layout.to_dense().any(-1)
    empty = empty.repeat_interleave(4 // empty.shape[1], 1)

    def attend(q, k, v, *bias):
        options = {"block_bias": bias[0] if bias else None, "dropout": dropout(TINY) if extra == "dropout" else None}
        out, lse = block_sparse_attention_with_lse(q, k, v, layout, backend=backend, **options)
        return out, lse.masked_fill(empty, 0.0)  # −inf has no finite difference

    assert torch.autograd.gradcheck(attend, (*qkv, bias) if extra == "bias" else qkv)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128])
def test_bf16_errs_at_most_twice_as_much_as_dense_attention_in_bf16(dim, causal, packed, backend):
    n, sizes = 500, Sizes(batch=2, heads=4, kv_heads=2, nq=500, nkv=500, dim=dim)
    ids = (torch.arange(n) // 130).int().expand(2, n) if packed else None
    layout = (LocalWindow(130) | GlobalTokens(4)).layout(n, block=64, heads=4, kv_heads=2, causal=causal, documents=ids)
    allowed = layout.to_dense()
    qkv = inputs(sizes, torch.bfloat16)
    grad = torch.randn(2, 4, n, dim, generator=torch.Generator().manual_seed(5)).bfloat16()

    def attend(given):
        return scaled_dot_product_attention(*given, attn_mask=allowed, enable_gqa=True)

    def all_results(function, given):
        out = function(given)
        return [out.detach(), *torch.autograd.grad(out, given, grad.to(out.dtype))]

    exact = all_results(attend, tuple(x.detach().double().requires_grad_() for x in qkv))
    dense = all_results(attend, qkv)
    ours = all_results(lambda given: block_sparse_attention(*given, fitting(backend, layout), backend=backend), qkv)
    assert [x.dtype for x in ours] == [torch.bfloat16] * 4
    for name, found, of_dense, wanted in zip(["out", "q", "k", "v"], ours, dense, exact, strict=True):
        assert relative_error(found, wanted) <= 2 * relative_error(of_dense, wanted), name


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.bfloat16, "blocked"),
        (torch.float16, "blocked"),
        (torch.bfloat16, "native"),
        (torch.bfloat16, "per_query"),
        (torch.float16, "per_query"),
    ],
)
def test_half_precision_returns_its_dtype_and_an_fp32_lse_near_the_reference(dtype, backend):
    sizes = Sizes(dim=32)
    layout = random_layout(sizes, Tables(2, 2, 16, 8, most=5, dense_rows=(1,), rule="both"))
    bias = torch.randn(1, 2, *layout.kv_indices.shape[2:]).requires_grad_()
    found = results(backend, inputs(sizes, dtype), layout, bias=bias)
    exact = results(
        "reference", tuple(x.detach().double().requires_grad_() for x in inputs(sizes, dtype)), layout, bias=bias
    )
    assert found["lse"].dtype == torch.float32 and found["gradient of block_bias"].dtype == torch.float32
    assert all(found[name].dtype == dtype for name in ("out", "gradient of q", "gradient of k", "gradient of v"))
    read = exact["lse"].isfinite()
    assert torch.equal(read, found["lse"].isfinite())
    assert (found["lse"] - exact["lse"])[read].abs().max() < 0.05
    for name in found.keys() - {"lse"}:
        assert relative_error(found[name], exact[name].double()) < 0.02, name


def test_fp32_errs_no_more_than_dense_attention(backend):
    n, sizes = 500, Sizes(batch=1, heads=4, kv_heads=2, nq=500, nkv=500, dim=64)
    layout = LocalWindow(130).layout(n, block=64)
    qkv = inputs(sizes)
    exact = block_sparse_attention(*(x.double() for x in qkv), layout, backend="reference")
    dense = scaled_dot_product_attention(*qkv, attn_mask=layout.to_dense(), enable_gqa=True)
    ours = block_sparse_attention(*qkv, fitting(backend, layout), backend=backend)
    assert relative_error(ours, exact) <= 2 * relative_error(dense, exact) + 1e-7


def test_the_same_call_gives_the_same_bits(backend):
    sizes = Sizes(dim=32)
    layout = random_layout(sizes, Tables(2, 2, 16, 16, most=4, dense_rows=(1,)))
    bias = torch.randn(2, 4, *layout.kv_indices.shape[2:]).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (
            results(backend, inputs(sizes, dtype), layout, bias=bias, dropout=dropout(sizes)) for _ in range(2)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_activation_checkpointing_recomputes_the_same_bits(backend):
    sizes = Sizes(dim=32)
    layout = fitting(backend, random_layout(sizes, Tables(1, 2, 16, 16, most=4)))
    options = {"dropout": dropout(sizes), "backend": backend}
    grads = []
    for recompute in (False, True):
        qkv = inputs(sizes)

        def attend(q, k, v):
            return block_sparse_attention(q, k, v, layout, **options)

        out = torch.utils.checkpoint.checkpoint(attend, *qkv, use_reentrant=False) if recompute else attend(*qkv)
        grads.append([out.detach(), *torch.autograd.grad(out.square().sum(), qkv)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
