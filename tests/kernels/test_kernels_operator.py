"""What is particular to operators: torch.compile sees one node, PyTorch's own checks of it, memory linear in N."""

import pytest
import torch
from kernel_cases import (
    Sizes,
    Tables,
    assert_equal_results,
    dropout,
    fitting,
    inputs,
    random_layout,
    results,
    with_dense_mask,
)

from lightsparse.kernels import block_sparse_attention, block_sparse_attention_with_lse
from lightsparse.kernels.torch_ops import lists, per_query
from lightsparse.kernels.workspace import workspace
from lightsparse.patterns import GlobalTokens, LocalWindow, Strided

SIZES = Sizes(batch=2, heads=4, kv_heads=2, nq=20, nkv=31, dim=8)


def calls(backend: str = "blocked"):
    """Name → (layout, bias, dropout): every optional argument of the operators, given and not."""
    plain = random_layout(SIZES, Tables(1, 2, 8, 4, most=3, dense_rows=(1,)))
    packed = random_layout(SIZES, Tables(2, 4, 8, 4, most=3, rule="documents"))
    plain, packed = fitting(backend, plain), fitting(backend, packed)
    bias = torch.randn(1, 2, *packed.kv_indices.shape[2:]).requires_grad_()
    masked = with_dense_mask(plain, torch.rand(2, 1, 20, 31) < 0.7)
    return {"plain": (plain, None, None), "packed": (packed, bias, dropout(SIZES)), "masked": (masked, None, None)}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, of)
        for name in calls()
        for of in ("blocked", "native", "per_query")
        if name != "masked" or of == "blocked"
    ],
)
def test_compiled_with_one_graph_equals_eager(name, backend):
    layout, bias, drop = calls(backend)[name]

    def attend(q, k, v, bias):
        return block_sparse_attention_with_lse(q * 1.0, k, v, layout, block_bias=bias, dropout=drop, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    eager_inputs, compiled_inputs = inputs(SIZES), inputs(SIZES)
    wanted, found = attend(*eager_inputs, bias), compiled(*compiled_inputs, bias)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    of = [x.detach().nan_to_num(neginf=0.0) for x in wanted]
    grads = []
    for given, made in ((compiled_inputs, found), (eager_inputs, wanted)):
        leaves = given if bias is None else (*given, bias)
        grads.append(torch.autograd.grad(made, leaves, of))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, of)
        for name in calls()
        for of in ("blocked", "native", "per_query")
        if name != "masked" or of == "blocked"
    ],
)
def test_the_operators_pass_pytorchs_own_checks(name, watched, backend):
    layout, bias, drop = calls(backend)[name]
    _, ours = watched(lambda: results(backend, inputs(SIZES), layout, bias=bias, dropout=drop))
    assert len(ours) >= 2  # forward and backward
    for operator, args in ours:
        is_forward = "backward" not in str(operator)
        # The gradient of the backward is not defined, so only the forward gets inputs that require one.
        given = tuple(
            x.detach().clone().requires_grad_(is_forward and x.is_floating_point() and i < 3)
            if isinstance(x, torch.Tensor)
            else x
            for i, x in enumerate(args)
        )
        torch.library.opcheck(
            operator, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def test_only_what_asks_for_a_gradient_gets_one(backend):
    layout, _, _ = calls(backend)["plain"]
    q, k, v = inputs(SIZES)
    out = block_sparse_attention(q.detach(), k, v.detach(), layout, backend=backend)
    assert out.requires_grad
    (grad,) = torch.autograd.grad(out.square().sum(), k)
    assert grad.abs().max() > 0
    with torch.no_grad():
        assert not block_sparse_attention(q, k, v, layout, backend=backend).requires_grad


def test_inputs_are_left_as_they_are(backend):
    layout, bias, drop = calls(backend)["packed"]
    qkv = inputs(SIZES)
    before = [x.detach().clone() for x in (*qkv, bias, layout.kv_indices)]
    results(backend, qkv, layout, bias=bias, dropout=drop)
    for x, old in zip((*qkv, bias, layout.kv_indices), before, strict=True):
        assert torch.equal(x.detach(), old)


@pytest.mark.parametrize("causal", [True, False])
def test_no_tensor_is_as_large_as_the_square_of_the_length(causal, watched, backend, monkeypatch, threads):
    threads(1)  # each has a workspace of its own
    for module, name in ((per_query, "_PARTS"), (lists, "_NUMBERS")):  # or all rows would be worked on at once
        monkeypatch.setattr(module, name, 1 << 16)

    def largest(n: int) -> int:
        sizes = Sizes(batch=1, heads=2, kv_heads=1, nq=n, nkv=n, dim=16)
        layout = (LocalWindow(40) | GlobalTokens(2)).layout(n, block=32, heads=2, kv_heads=1, causal=causal)
        workspace().clear()  # of what larger calls have left
        return watched(lambda: results(backend, inputs(sizes), layout))[0]

    small, large = largest(1024), largest(4096)
    assert large <= 4 * small + 1024
    assert large < 4096 * 4096 / 16
    # What is allowed: inputs, gradients and the layout, a few numbers per feature, and a tile of scores.
    assert large <= 2 * 4096 * 2 * 16 + (4096 * 32 * 2 if not causal else 0)


def test_the_walk_sees_what_the_reference_makes(watched):
    """The watch above can fail: the reference is quadratic."""
    sizes = Sizes(batch=1, heads=2, kv_heads=1, nq=512, nkv=512, dim=8)
    layout = Strided(4).layout(512, block=32)
    assert watched(lambda: results("reference", inputs(sizes), layout))[0] >= 2 * 512 * 512


def test_a_compiled_call_equals_the_reference(backend):
    layout, bias, drop = calls(backend)["packed"]
    with torch.no_grad():
        compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
        q, k, v = inputs(SIZES)
        out = compiled(q, k, v, layout, block_bias=bias, dropout=drop, backend=backend)
        exact = block_sparse_attention(q, k, v, layout, block_bias=bias, dropout=drop, backend="reference")
    assert_equal_results({"out": out}, {"out": exact}, 1e-5)


@pytest.mark.parametrize("of", ["blocked", "native"])
def test_a_compiled_call_takes_batches_of_any_size(of):
    """Sizes that vary become symbols to the compiler, which the checks of a call have to understand."""
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    for batch, length in ((1, 64), (2, 64), (3, 96), (2, 128)):
        documents = (torch.arange(length)[None] >= torch.arange(1, batch + 1)[:, None] * 16).int()
        layout = LocalWindow(16).layout(length, block=16, documents=documents)
        q = torch.randn(batch, 2, length, 8)
        with torch.no_grad():
            exact = block_sparse_attention(q, q, q, layout, backend="reference")
            block_sparse_attention(q, q, q, layout, backend=of)  # says which it is, outside of the compiler
            torch.testing.assert_close(compiled(q, q, q, layout, backend=of), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["blocked", "native", "per_query"])
def test_autocast_around_a_kernel_changes_no_bit(backend, dtype):
    layout, _, drop = calls(backend)["packed"]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):  # the backward inside, too
            found.append(results(backend, inputs(SIZES, dtype), layout, dropout=drop))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value) and found[1][name].dtype == value.dtype, name
