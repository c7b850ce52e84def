import pytest
import torch

from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, PerHead, RandomBlocks, Strided

DOCUMENTS = (torch.arange(111) >= torch.tensor([[37], [64]])).int()
PARTS = [LocalWindow(20), Strided(3), GlobalTokens(5) | LocalWindow(1), LocalWindow(20)]


def read(pattern, **fields):
    """Bool [B, H, NQ, NK] over four query heads."""
    layout = pattern.layout(111, block=16, heads=4, **fields)
    tiles = layout.block_map()
    return tiles.repeat_interleave(4 // tiles.shape[1], 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_query_head_reads_what_its_own_part_reads_alone(kv_heads, documents, causal):
    fields = {"kv_heads": kv_heads, "causal": causal, "documents": documents}
    together = read(PerHead(PARTS), **fields)
    for head, part in enumerate(PARTS):
        assert (together[:, head] == read(part, **fields)[:, head]).all()


@pytest.mark.parametrize("causal", [True, False])
def test_with_a_part_per_key_value_head_its_group_shares_it(causal):
    fields = {"kv_heads": 2, "causal": causal}
    together = read(PerHead(PARTS[:2]), **fields)
    for head in range(4):
        assert (together[:, head] == read(PARTS[head // 2], **fields)[:, head]).all()
    assert PerHead(PARTS[:2]).layout(111, block=16, heads=4, kv_heads=2).kv_indices.shape[1] == 2


@pytest.mark.parametrize("number", [2, 4])
def test_a_part_that_differs_by_head_itself_gives_each_head_its_own(number):
    varying = BlockDilated((96,), (2,)), RandomBlocks(2, per_head=True)
    parts = [varying[head % 2] for head in range(number)]
    together = read(PerHead(parts), kv_heads=2)
    for head in range(4):
        assert (together[:, head] == read(parts[head * number // 4], kv_heads=2)[:, head]).all()


def test_it_composes_with_other_patterns():
    united = read(PerHead(PARTS) | BlockDilated((96,), (2,)), kv_heads=2)
    assert (united == read(PerHead(PARTS), kv_heads=2) | read(BlockDilated((96,), (2,)), kv_heads=2)).all()
    common = read(PerHead(PARTS) & LocalWindow(40), kv_heads=2)
    assert (common == read(PerHead(PARTS), kv_heads=2) & read(LocalWindow(40), kv_heads=2)).all()


def test_only_rows_that_are_dense_for_every_head_are_dense_rows():
    everywhere = PerHead([GlobalTokens(5), GlobalTokens(20)]).layout(111, block=16, heads=2, causal=False)
    assert everywhere.dense_rows.tolist() == [0]
    assert everywhere.block_map()[0, :, 1].sum(-1).tolist() == [1, 7]
    nowhere = PerHead([GlobalTokens(5), LocalWindow(5)]).layout(111, block=16, heads=2, causal=False)
    assert nowhere.dense_rows.tolist() == [] and nowhere.block_map()[0, :, 0].sum(-1).tolist() == [7, 2]


@pytest.mark.parametrize("number", [2, 4])
def test_the_kernel_computes_every_head_as_if_it_were_alone(number):
    torch.manual_seed(0)
    q = torch.randn(1, 4, 111, 32, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 111, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parts = PARTS[:number]

    def gradients(out):
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    found = gradients(block_sparse_attention(q, k, v, PerHead(parts).layout(111, block=16, heads=4, kv_heads=2)))
    alone = [
        block_sparse_attention(
            q[:, h : h + 1],
            k[:, h // 2 : h // 2 + 1],
            v[:, h // 2 : h // 2 + 1],
            parts[h * number // 4].layout(111, block=16),
        )
        for h in range(4)
    ]
    for a, b in zip(found, gradients(torch.cat(alone, 1)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_part_of_the_rows_reads_what_they_read_in_the_whole():
    whole = PerHead(PARTS).layout(111, block=16, heads=4).block_map()
    part = PerHead(PARTS).layout(111, block=16, heads=4, rows=range(3, 6)).block_map()
    assert (part == whole[:, :, 3:6]).all()


def test_another_number_of_parts_is_refused_with_both_counts():
    with pytest.raises(ValueError, match=r"holds 3 patterns; .* 2 key/value heads or .* 4 query heads"):
        PerHead(PARTS[:3]).layout(111, block=16, heads=4, kv_heads=2)
    with pytest.raises(ValueError, match="empty"):
        PerHead([])


def test_equal_parts_make_equal_patterns():
    assert PerHead(PARTS) == PerHead(tuple(PARTS)) and hash(PerHead(PARTS)) == hash(PerHead(tuple(PARTS)))
