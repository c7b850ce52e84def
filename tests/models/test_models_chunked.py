import pytest
import torch
import torch.nn.functional as F

from lightsparse.kernels import compute_dtype
from lightsparse.models.chunked import cross_entropy_sum, map_chunks, token_cross_entropy

TOKENS, EMBED, VOCAB = 101, 12, 29


@pytest.fixture
def loss_inputs():
    torch.manual_seed(0)
    labels = torch.randint(0, VOCAB, (TOKENS,))
    labels[3::5] = -100
    return torch.randn(TOKENS, EMBED, requires_grad=True), torch.randn(VOCAB, EMBED, requires_grad=True), labels


@pytest.mark.parametrize("chunk", [1, 7, 50, 100, 101, 1000])
def test_chunked_loss_and_its_gradients_are_those_of_cross_entropy(loss_inputs, chunk):
    hidden, weight, labels = loss_inputs
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected_grads = torch.autograd.grad(expected / 17, [hidden, weight])
    loss = cross_entropy_sum(hidden, weight, labels, chunk)
    torch.testing.assert_close(loss, expected)
    for grad, expected_grad in zip(torch.autograd.grad(loss / 17, [hidden, weight]), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_loss_per_token_sums_to_the_loss_and_is_zero_where_ignored(loss_inputs):
    hidden, weight, labels = loss_inputs
    losses = token_cross_entropy(hidden, weight, labels, 13)
    assert not losses.requires_grad
    assert (losses[labels == -100] == 0).all()
    assert (losses[labels != -100] > 0).all()
    torch.testing.assert_close(losses.sum(), cross_entropy_sum(hidden, weight, labels, 50))


def test_without_gradients_the_loss_is_the_same(loss_inputs):
    with torch.no_grad():
        plain = cross_entropy_sum(*loss_inputs, 50)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, cross_entropy_sum(*loss_inputs, 50).detach())


def test_ignored_tokens_change_neither_loss_nor_gradients(loss_inputs):
    hidden, weight, labels = loss_inputs
    kept = labels != -100
    loss, kept_loss = (
        cross_entropy_sum(hidden, weight, labels, 16),
        cross_entropy_sum(hidden[kept], weight, labels[kept], 16),
    )
    torch.testing.assert_close(loss, kept_loss)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert (grad[~kept] == 0).all()
    assert (grad[kept].abs().sum(1) > 0).all()


def test_a_batch_without_labels_has_loss_and_gradients_zero(loss_inputs):
    hidden, weight, labels = loss_inputs
    loss = cross_entropy_sum(hidden, weight, torch.full_like(labels, -100), 16)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, [hidden, weight]))


def test_a_sum_over_bf16_keeps_its_digits():
    torch.manual_seed(0)
    hidden = torch.randn(4000, EMBED).bfloat16().requires_grad_()
    weight = torch.randn(VOCAB, EMBED).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCAB, (4000,))
    loss = cross_entropy_sum(hidden, weight, labels, 512)
    assert loss.dtype == torch.float32
    expected = token_cross_entropy(hidden, weight, labels, 512).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
    exact = torch.autograd.grad(
        F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum"), [hidden, weight]
    )
    for grad, expected_grad in zip(grads, exact, strict=True):
        assert (grad - expected_grad).float().norm() < 0.01 * expected_grad.float().norm()


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_autocast_multiplies_in_what_is_faster_and_keeps_the_loss_and_the_gradients_fp32(
    loss_inputs, monkeypatch, products
):
    monkeypatch.setattr(compute_dtype, "_multiplies_bf16_faster", lambda: products is torch.bfloat16)
    hidden, weight, labels = loss_inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_sum(hidden, weight, labels, 16)
    rounded = cross_entropy_sum(hidden.to(products), weight.to(products), labels, 16)
    assert loss.dtype == torch.float32
    assert loss.item() == rounded.item()
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, [hidden, weight]))


def test_the_loss_never_holds_all_logits(largest_tensor):
    hidden, weight = torch.randn(1000, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    labels = torch.randint(0, 512, (1000,))
    largest = largest_tensor(lambda: cross_entropy_sum(hidden, weight, labels, 64).backward())
    assert largest == 64 * 512
    assert largest_tensor(lambda: token_cross_entropy(hidden, weight, labels, 64)) == 64 * 512
    assert largest_tensor(lambda: cross_entropy_sum(hidden, weight, labels, 1000).backward()) == 1000 * 512


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [1, 8, 33, 65, 66, 500])
def test_a_function_of_single_tokens_is_the_same_in_chunks(chunk, recompute):
    torch.manual_seed(0)
    x = torch.randn(2, 33, 6, requires_grad=True)
    weight = torch.randn(6, 6, requires_grad=True)
    out_grad = torch.randn(2, 33, 6)

    def function(x):
        return x + F.silu(x @ weight)

    chunked = map_chunks(function, x, chunk, recompute=recompute)
    torch.testing.assert_close(chunked, function(x))
    grads = torch.autograd.grad(chunked, [x, weight], out_grad)
    for grad, expected in zip(grads, torch.autograd.grad(function(x), [x, weight], out_grad), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_one_chunk_is_computed_once_and_several_twice():
    calls = []

    def function(x):
        calls.append(x.shape)
        return torch.sin(x)

    x = torch.randn(1, 60, 2, requires_grad=True)
    map_chunks(function, x, 60, recompute=False).sum().backward()
    assert calls == [(1, 60, 2)]
    calls.clear()
    map_chunks(function, x, 25, recompute=False).sum().backward()
    assert calls == [(20, 2)] * 6
    calls.clear()
    with torch.no_grad():
        map_chunks(function, x, 25, recompute=True)
    assert calls == [(20, 2)] * 3
