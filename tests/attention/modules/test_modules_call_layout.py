"""PyTorch's masks as a layout: every form says the same as the mask written out, and costs what it should."""

from __future__ import annotations

import pytest
import torch
from multihead_pair import B, H, added, attn_mask, padding

from lightsparse.attention.modules.call_layout import appended, every_key, is_causal_mask, masked, of_the_past
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow

CPU = torch.device("cpu")
PATTERN = LocalWindow(7) | GlobalTokens(2) | BlockDilated((16, 32), (1, 2))


def plain(n: int = 63):
    """A bidirectional layout with a dense row and tables that differ by head."""
    layout = PATTERN.layout(n, block=8, heads=H, causal=False)
    assert len(layout.dense_rows) and layout.kv_indices.shape[1] == H
    return layout


def test_padding_is_an_interval_in_both_of_its_forms() -> None:
    layout, hidden = plain(), padding(63)
    right = layout.to_dense() & ~hidden[:, None, None]
    for mask in (hidden, added(hidden)):
        found = masked(layout, H, mask, None)
        assert found.mask.dense is None and torch.equal(found.to_dense(), right)
        assert found.kv_indices is layout.kv_indices


@pytest.mark.parametrize("kind", ["bool", "float", "bool 3-D", "float 3-D"])
def test_explicit_masks_hide_what_they_hid(kind: str) -> None:
    n = 63
    layout, mask = plain(n), attn_mask(kind, n)
    assert mask is not None
    hides = mask if mask.dtype == torch.bool else mask == float("-inf")
    hides = hides.view(B, H, n, n) if hides.dim() == 3 else hides
    for hidden in (None, padding(n)):
        right = layout.to_dense() & ~hides
        right = right if hidden is None else right & ~hidden[:, None, None]
        found = masked(layout, H, hidden, mask).to_dense()
        assert torch.equal(found, right.expand_as(found))


def test_a_float_padding_mask_beside_a_bool_mask_keeps_both() -> None:
    n = 21
    scores, mask = torch.randn(B, n), attn_mask("bool", n)
    assert mask is not None
    dense = masked(plain(n), H, scores, mask).mask.dense
    assert dense is not None
    right = scores[:, None, None].expand(B, 1, n, n).masked_fill(mask, float("-inf"))
    assert torch.equal(dense, right)


def test_the_past_is_the_layout_without_later_keys_and_without_blocks_of_them() -> None:
    layout = plain()
    past = of_the_past(layout)
    assert torch.equal(past.to_dense(), layout.to_dense().tril())
    own = torch.arange(past.num_q_blocks)[:, None]
    assert (past.kv_indices <= own).all() and past.mask.causal
    for nq, nkv in ((37, 70), (70, 37)):
        rectangle = of_the_past(every_key(nq, nkv, 8, CPU))
        assert torch.equal(rectangle.to_dense()[0, 0], torch.ones(nq, nkv, dtype=torch.bool).tril())


@pytest.mark.parametrize("n", [63, 64])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_appended_keys_are_read_by_everyone_and_begin_at_a_whole_block(n: int, count: int) -> None:
    layout = masked(plain(n), H, padding(n), attn_mask("bool", n))
    wider = appended(layout, count)
    assert wider.num_keys == 64 + count and wider.num_tokens == n
    allowed = wider.to_dense()
    assert torch.equal(allowed[..., :n], layout.to_dense())
    assert not allowed[..., n:64].any() and allowed[..., 64:].all()
    assert torch.equal(wider.dense_rows, layout.dense_rows)
    assert (wider.kv_indices[:, :, wider.dense_rows.long()] == -1).all(), "dense rows stay out of the table"


def test_only_the_causal_mask_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightsparse.attention.modules.call_layout._CHUNK", 100)
    for n, m in ((63, 63), (5, 9), (9, 5), (1, 1)):
        mask = attn_mask("causal", n, m)
        assert mask is not None
        assert is_causal_mask(mask) and is_causal_mask(added(mask))
        for changed in (mask.clone(), added(mask)):
            changed[n - 1, 0] = True
            assert not is_causal_mask(changed)
    assert not is_causal_mask(torch.zeros(B * H, 63, 63, dtype=torch.bool))
