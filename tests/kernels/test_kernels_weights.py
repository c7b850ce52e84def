"""Block-form weights against the softmax written out: values, gradients, what is zero, how much is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightsparse.kernels import block_sparse_attention
from lightsparse.kernels import weights as module
from lightsparse.kernels.weights import attention_weights, list_dense_rows, to_dense_weights
from lightsparse.patterns import BlockDilated, BlockLayout, ElementMask, GlobalTokens, LocalWindow
from lightsparse.patterns.mask import ALWAYS

B, H, HKV, D = 2, 4, 2, 8


def inputs(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return tuple(torch.randn(B, heads, n, D, generator=g, dtype=dtype).requires_grad_() for heads in (H, HKV))


def layout_of(n: int, kind: str) -> BlockLayout:
    documents = torch.tensor([[0, 1], [0, 0]]).repeat_interleave(torch.tensor([n - n // 3, n // 3]), 1).int()
    sizes = {"block": 16, "heads": H, "kv_heads": HKV}
    if kind == "causal":
        return LocalWindow(20).layout(n, **sizes)
    if kind == "heads differ":
        return BlockDilated((32, 64), (1, 2)).layout(n, **sizes)
    if kind == "documents":
        return LocalWindow(40).layout(n, documents=documents, **sizes)
    if kind == "bidirectional":
        return LocalWindow(9).layout(n, causal=False, **sizes)
    if kind == "wide":
        return list_dense_rows((LocalWindow(9) | GlobalTokens(2)).layout(n, causal=False, **sizes))
    g = torch.Generator().manual_seed(4)
    plain = LocalWindow(40).layout(n, causal=False, **sizes)
    if kind == "bool mask":
        dense = torch.rand(B, 1, n, n, generator=g) < 0.3
        dense[0, 0, 5] = False  # a query with nothing to read
    else:
        dense = torch.randn(1, H, n, n, generator=g, dtype=torch.float64)
        dense[0, :, 7] = float("-inf")
    hidden = torch.arange(n).expand(B, n) % 11 == 3
    opens = torch.where(hidden, ALWAYS, plain.mask.visible_from)
    closes = plain.mask.visible_until.expand_as(opens)
    return replace(plain, mask=replace(plain.mask, dense=dense, visible_from=opens, visible_until=closes))


KINDS = ("causal", "heads differ", "documents", "bidirectional", "wide", "bool mask", "float mask")


def written_out(q: Tensor, k: Tensor, layout: BlockLayout, scale: float, tile_bias: Tensor | None = None) -> Tensor:
    """[B, H, Nq, Nkv]. tile_bias: [B|1, H, Nq, Nkv]."""
    allowed = layout.to_dense()
    allowed = allowed.repeat_interleave(H // allowed.shape[1], 1)
    scores = q @ k.repeat_interleave(H // k.shape[1], 1).mT * scale
    if tile_bias is not None:
        scores = scores + tile_bias
    dense = layout.mask.dense
    if dense is not None and dense.dtype != torch.bool:
        scores = scores + dense.masked_fill(dense == float("-inf"), 0.0)
    scores = scores.masked_fill(~allowed, -1e30)
    return scores.softmax(-1) * allowed.any(-1, keepdim=True) * allowed


@pytest.mark.parametrize("n", [63, 111])
@pytest.mark.parametrize("kind", KINDS)
def test_block_form_is_the_softmax_of_the_allowed_pairs(kind: str, n: int) -> None:
    layout = layout_of(n, kind)
    q, k = inputs(n)
    found = to_dense_weights(attention_weights(q, k, layout), layout)
    right = written_out(q, k, layout, D**-0.5)
    torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
    downstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=found.dtype)
    for grad, expected in zip(
        torch.autograd.grad((found * downstream).sum(), (q, k)),
        torch.autograd.grad((right * downstream).sum(), (q, k)),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_sums_to_one_or_has_nothing_to_read(kind: str) -> None:
    layout = layout_of(111, kind)
    weights = attention_weights(*inputs(111, torch.float32), layout)
    assert weights.shape == (B, H, 7, layout.kv_indices.shape[3], 16, 16) and weights.dtype == torch.float32
    sums = weights.sum((3, 5)).flatten(2)
    reads = layout.to_dense().any(-1)
    reads = reads.repeat_interleave(H // reads.shape[1], 1).expand(B, H, -1)
    torch.testing.assert_close(sums[:, :, :111], reads.float(), atol=1e-6, rtol=0)
    assert not sums[:, :, 111:].any(), "queries past the end"
    table = layout.kv_indices.repeat_interleave(H // layout.kv_indices.shape[1], 1)[..., None, None]
    assert not weights[..., 111 % 16 :].masked_select(table == 111 // 16).any(), "keys past it"
    assert not weights.masked_select(table < 0).any(), "entries that name no block"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_values_is_what_the_kernels_give(kind: str) -> None:
    layout = layout_of(63, kind)
    q, k = inputs(63)
    v = torch.randn_like(k)
    right = block_sparse_attention(q, k, v, layout, scale=0.3, backend="blocked")
    weights = to_dense_weights(attention_weights(q, k, layout, scale=0.3), layout)
    torch.testing.assert_close(weights @ v.repeat_interleave(H // HKV, 1), right, atol=1e-10, rtol=0)


@pytest.mark.parametrize("heads", [1, HKV, H])
def test_a_block_bias_shifts_the_scores_of_its_entry(heads: int) -> None:
    n = 63
    layout = layout_of(n, "causal")
    table = layout.kv_indices
    q, k = inputs(n)
    bias = torch.randn(1, heads, *table.shape[2:], dtype=torch.float64, requires_grad=True)
    pairs = torch.zeros(1, H, n, n, dtype=torch.float64)
    of_head = bias.repeat_interleave(H // heads, 1)
    for row in range(table.shape[2]):
        for entry, block in enumerate(table[0, 0, row].tolist()):
            if block >= 0:
                at = slice(16 * row, 16 * row + 16), slice(16 * block, 16 * block + 16)
                pairs[:, :, *at] = pairs[:, :, *at] + of_head[:, :, row, entry, None, None]
    found = to_dense_weights(attention_weights(q, k, layout, block_bias=bias), layout)
    right = written_out(q, k, layout, D**-0.5, pairs)
    torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
    for grad, expected in zip(
        torch.autograd.grad((found**2).sum(), (q, k, bias)),
        torch.autograd.grad((right**2).sum(), (q, k, bias)),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected, atol=1e-11, rtol=0)


def test_a_float_mask_gets_its_gradient_and_empty_rows_give_none() -> None:
    layout = layout_of(63, "float mask")
    q, k = inputs(63)
    assert layout.mask.dense is not None
    layout.mask.dense.requires_grad_()
    (found,) = torch.autograd.grad(
        (to_dense_weights(attention_weights(q, k, layout), layout) ** 2).sum(), layout.mask.dense
    )
    (right,) = torch.autograd.grad((written_out(q, k, layout, D**-0.5) ** 2).sum(), layout.mask.dense)
    torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
    assert found.any() and not found[:, :, 7].any()


def test_rows_computed_apart_are_the_rows_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(111, "float mask")
    q, k = inputs(111)
    together = attention_weights(q, k, layout)
    monkeypatch.setattr(module, "_CHUNK", 1)
    assert torch.equal(attention_weights(q, k, layout), together)


def test_memory_follows_the_table_not_the_square() -> None:
    n, block = 4096, 32
    layout = LocalWindow(33).layout(n, block=block)
    q = torch.randn(1, 1, n, 4)
    weights = attention_weights(q, q, layout)
    assert weights.numel() == n * 2 * block < n * n / 50


def test_listing_dense_rows_changes_nothing_that_is_read() -> None:
    layout = (LocalWindow(9) | GlobalTokens(2)).layout(63, block=16, causal=False)
    assert len(layout.dense_rows)
    listed = list_dense_rows(layout)
    assert not len(listed.dense_rows) and torch.equal(listed.to_dense(), layout.to_dense())
    plain = layout_of(63, "causal")
    assert list_dense_rows(plain) is plain


def test_what_does_not_fit_is_refused() -> None:
    layout = (LocalWindow(9) | GlobalTokens(2)).layout(63, block=16, causal=False)
    q, k = inputs(63)
    with pytest.raises(ValueError, match="list_dense_rows"):
        attention_weights(q, k, layout)
    with pytest.raises(ValueError, match="the layout is for 63 queries and 63 keys; q has 63 and k 62"):
        attention_weights(q, k[:, :, 1:], layout_of(63, "causal"))


def test_a_table_without_entries_gives_weights_without_entries() -> None:
    nothing = torch.empty(0, dtype=torch.int32)
    position = torch.arange(5, dtype=torch.int32)[None]
    mask = ElementMask(position, position, torch.full_like(position, ALWAYS))
    layout = BlockLayout(torch.empty(1, 1, 3, 0, dtype=torch.int32), 2, 2, mask, nothing)
    q = torch.randn(1, 1, 5, 4)
    weights = attention_weights(q, q, layout)
    assert weights.shape == (1, 1, 3, 0, 2, 2)
    assert torch.equal(to_dense_weights(weights, layout), torch.zeros(1, 1, 5, 5))
