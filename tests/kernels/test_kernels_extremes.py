"""Scores so large that fp32 holds no logarithm beside them, NaN scores, and derivatives that a kernel lacks."""

import pytest
import torch
from kernel_cases import fitting

from lightsparse.kernels import block_sparse_attention, block_sparse_attention_with_lse
from lightsparse.patterns import BlockLayout, LocalWindow

OPERATORS = ("native", "blocked", "per_query", "triton")
TOKENS, HEADS, DIM = 40, 2, 16


def everything(backend: str) -> BlockLayout:
    if backend == "triton":
        pytest.importorskip("triton")
    return fitting(backend, LocalWindow(TOKENS).layout(TOKENS, block=16 if backend == "triton" else 8, causal=False))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in ("reference", *OPERATORS)
        for dtype in (torch.float32, torch.bfloat16)
        if (backend, dtype) != ("triton", torch.bfloat16)  # which its interpreter does not multiply by itself
    ],
)
def test_weights_of_equal_scores_sum_to_one_however_large_the_scores(backend, dtype):
    q = torch.full((1, HEADS, TOKENS, DIM), 133120.0, dtype=dtype, requires_grad=True)
    k = q.detach().clone().requires_grad_()
    v = torch.ones_like(k, requires_grad=True)
    out = block_sparse_attention(q, k, v, everything(backend), backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-5, atol=0)
    out.sum().backward()
    torch.testing.assert_close(v.grad, torch.ones_like(v), rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", ["reference", *OPERATORS])
def test_a_row_with_nan_scores_is_nan_and_no_other(backend):
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, DIM).unbind()
    q[0, 1, 7, 3] = float("nan")
    out, lse = block_sparse_attention_with_lse(q, k, v, everything(backend), backend=backend)
    expected = torch.zeros(1, HEADS, TOKENS, dtype=torch.bool)
    expected[0, 1, 7] = True
    assert torch.equal(out.isnan().any(-1), expected) and torch.equal(lse.isnan(), expected)


@pytest.mark.parametrize("of", ["q", "k", "v", "block_bias"])
@pytest.mark.parametrize("backend", OPERATORS)
def test_a_forward_mode_derivative_is_refused_instead_of_zero(backend, of):
    layout = everything(backend)
    given = dict(zip("qkv", torch.randn(3, 1, HEADS, TOKENS, DIM), strict=True))
    given["block_bias"] = torch.randn(1, 1, *layout.kv_indices.shape[2:])

    def attend(x):
        return block_sparse_attention(**{**given, of: x}, layout=layout, backend=backend)

    with pytest.raises(NotImplementedError, match=f"{backend}' has no forward-mode derivative; use backend=reference"):
        torch.func.jvp(attend, (given[of],), (torch.ones_like(given[of]),))


def test_the_reference_has_forward_mode_derivatives():
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, DIM, dtype=torch.float64).unbind()
    layout, step = everything("reference"), torch.randn_like(q)

    def attend(x):
        return block_sparse_attention(x, k, v, layout, backend="reference")

    _, along = torch.func.jvp(attend, (q,), (step,))
    difference = (attend(q + 1e-6 * step) - attend(q - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(along, difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ["reference", *OPERATORS])
def test_a_batch_of_no_sequences_has_an_empty_result_and_empty_gradients(backend):
    q, k, v = (torch.zeros(0, HEADS, TOKENS, DIM, requires_grad=True) for _ in "qkv")
    out, lse = block_sparse_attention_with_lse(q, k, v, everything(backend), backend=backend)
    (out.sum() + lse.sum()).backward()
    assert out.shape == q.grad.shape == k.grad.shape == q.shape and lse.shape == q.shape[:3]
