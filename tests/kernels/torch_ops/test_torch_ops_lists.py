"""Lists of key blocks: masked scores say exactly what the layout says, in parts of any size, with few masks."""

import pytest
import torch
from kernel_cases import Sizes, Tables, assert_equal_results, dropout, inputs, random_layout, results, with_dense_mask

from lightsparse.kernels.torch_ops import blocked, lists
from lightsparse.kernels.torch_ops.call import Call
from lightsparse.kernels.torch_ops.lists import Lists
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, Strided

SIZES = Sizes(batch=2, heads=4, kv_heads=2, nq=50, nkv=63, dim=8)


def call_of(layout, sizes: Sizes = SIZES, bias=None) -> Call:
    q, k, v = inputs(sizes)
    return Call(q.detach(), k.detach(), v.detach(), layout, 1.0, bias, None, torch.float32)


@pytest.mark.parametrize("rule", ["causal", "both", "documents", "intervals"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize(("q_block", "kv_block"), [(16, 16), (8, 20), (1, 16), (64, 64)])
def test_masked_scores_are_open_exactly_where_the_layout_lets_a_query_read(q_block, kv_block, batch, heads, rule):
    layout = random_layout(SIZES, Tables(batch, heads, q_block, kv_block, most=4, rule=rule))
    call = call_of(layout)
    rebuilt = torch.zeros(call.L, call.M, call.J * call.S, dtype=torch.bool)
    for part in Lists(call, 0, call.L).parts():
        is_open = part.masked_scores(part.gathered(call.k_YSD)) > float("-inf")
        key_LC = (part.block_LK % call.J)[..., None] * call.S + torch.arange(call.S)
        key_LMC = key_LC.flatten(1)[:, None].expand_as(is_open)
        # Behind the end of a list stands a block that is in it already: what is closed there closes nothing.
        rebuilt[part.of_call] = rebuilt[part.of_call].int().scatter_add(2, key_LMC, is_open.int()).bool()
    found = call.by_head(rebuilt)[..., : SIZES.nkv]
    wanted = layout.to_dense()
    assert torch.equal(found, wanted.repeat_interleave(SIZES.heads // wanted.shape[1], 1).expand_as(found))


@pytest.mark.parametrize("table_heads", [1, 2, 4])
def test_scores_are_those_of_the_query_heads_and_keys_of_the_list(table_heads):
    layout = random_layout(SIZES, Tables(2, table_heads, 16, 8, most=4, rule="both"))
    call = call_of(layout)
    q, k, _ = (x.detach() for x in inputs(SIZES))
    dense = torch.nn.functional.pad(q @ k.repeat_interleave(2, 1).mT, (0, 1))
    for part in Lists(call, 3, call.L).parts():  # from the middle of a head on
        scores_LMC = part.masked_scores(part.gathered(call.k_YSD))
        key_LC = ((part.block_LK % call.J)[..., None] * call.S + torch.arange(call.S)).flatten(1)
        of_lists = call.by_list(dense)[part.of_call]
        wanted = of_lists.gather(2, key_LC[:, None].expand(-1, call.M, -1))
        is_open = scores_LMC > float("-inf")
        torch.testing.assert_close(scores_LMC[is_open], wanted[is_open])


@pytest.mark.parametrize("rule", ["causal", "documents", "intervals"])
@pytest.mark.parametrize("numbers", [1, 1 << 12])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_few_lists_at_a_time_equal_all_of_them(explicit, numbers, rule, monkeypatch):
    layout = random_layout(SIZES, Tables(2, 2, 8, 8, most=4, rule=rule, dense_rows=(1, 3)))
    if explicit:
        layout = with_dense_mask(layout, torch.rand(2, 4, 50, 63) < 0.8)
    bias = torch.randn(2, 4, *layout.kv_indices.shape[2:]).requires_grad_()
    found = []
    for _ in range(2):
        found.append(results("blocked", inputs(SIZES), layout, bias=bias, dropout=dropout(SIZES)))
        for module, name in ((lists, "_NUMBERS"), (blocked, "_INDICES"), (blocked, "_DENSE_ROW_SCORES")):
            monkeypatch.setattr(module, name, numbers)
    assert_equal_results(found[1], found[0], 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_lists_of_any_length_are_gathered_as_far_as_the_longest_beside_them(causal, monkeypatch):
    """A growing row costs what it reads, not what the longest row of the table reads."""
    monkeypatch.setattr(lists, "_NUMBERS", 1 << 14)
    n = 1000
    layout = Strided(2).layout(n, block=16, causal=causal)
    call = call_of(layout, Sizes(batch=1, heads=2, kv_heads=2, nq=n, nkv=n, dim=8))
    gathered = sum(part.block_LK.numel() for part in Lists(call, 0, call.L).parts())
    assert gathered <= 1.15 * 2 * int((layout.kv_indices >= 0).sum())


def test_a_window_needs_a_mask_in_its_own_block_only():
    layout = LocalWindow(160).layout(1024, block=16)
    call = call_of(layout, Sizes(batch=1, heads=1, kv_heads=1, nq=1024, nkv=1024, dim=8))
    of = Lists(call, 12, call.L)
    assert of.is_entry_LK.sum(-1).unique().tolist() == [11]
    assert of.partial_LK.sum(-1).unique().tolist() == [1] and of.partial_LK[:, -1].all()


@pytest.mark.parametrize(
    "pattern",
    [LocalWindow(70), LocalWindow(40) | GlobalTokens(4) | Strided(5), BlockDilated((128, 512), (2, 4))],
    ids=["window", "mixed", "per-head"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_taken_for_full_are_the_layouts_full_tiles(pattern, packed):
    ids = (torch.arange(500) // 77)[None].int() if packed else None
    layout = pattern.layout(500, block=16, heads=4, documents=ids)
    call = call_of(layout, Sizes(batch=1, heads=4, kv_heads=4, nq=500, nkv=500, dim=8))
    partial = Lists(call, 0, call.L).partial_LK.view(4, call.NQ, -1)
    full = layout.full_tiles[0].expand(4, -1, -1)
    assert not (~partial & ~full).any()
    whole_rows = slice(0, 500 // 16)  # the last row is shorter than a block, and its last query stands for the missing
    assert torch.equal(~partial[:, whole_rows], full[:, whole_rows])


def test_what_is_put_in_order_by_list_comes_back_by_head():
    for table_heads in (1, 2, 4):
        call = call_of(random_layout(SIZES, Tables(1, table_heads, 16, 8)))
        x = torch.randn(2, 4, 50, 3)
        assert torch.equal(call.by_head(call.by_list(x)), x)
