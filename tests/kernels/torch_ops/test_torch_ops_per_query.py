"""The `per_query` backend's two ways and its tiles. test_kernels_backends.py compares it with `reference`."""

import itertools

import pytest
import torch
from kernel_cases import Sizes, Tables, assert_equals_reference, dropout, inputs, random_layout, results

from lightsparse.kernels import block_sparse_attention
from lightsparse.kernels.torch_ops import lists as lists_module
from lightsparse.kernels.torch_ops import per_query
from lightsparse.kernels.torch_ops.block_tiles import block_tiles, most_tiles, queries_per_tile, readers, tiles_of
from lightsparse.patterns import BlockLayout, interval_mask
from lightsparse.patterns.layout import no_dense_rows

SIZES = Sizes(dim=16)


@pytest.fixture(params=["by block", "by query"])
def way(request, monkeypatch) -> str:
    """Every call goes this way, whatever it costs."""
    slots = {"by block": 16, "by query": None}[request.param]
    for name in ("queries_per_tile", "queries_per_tile_of_shape"):
        monkeypatch.setattr(per_query, name, lambda *sizes: slots)
    return request.param


@pytest.mark.parametrize(
    ("rule", "kv_block"), [("causal", 4), ("both", 7), ("documents", 16), ("intervals", 64), ("causal", 256)]
)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_both_ways_equal_the_reference_for_every_group_and_block(group, kv_block, rule, way):
    sizes = Sizes(batch=2, heads=8, kv_heads=8 // group, nq=63, nkv=63, dim=32)
    for table_heads in {1, sizes.kv_heads, sizes.heads}:
        layout = random_layout(sizes, Tables(2, table_heads, 1, kv_block, most=5, dense_rows=(3,), rule=rule))
        assert_equals_reference("per_query", inputs(sizes), layout)


@pytest.mark.parametrize("table_heads", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 1 << 13])
def test_a_portion_of_the_rows_at_a_time_equals_all_of_them(parts, table_heads, way, monkeypatch):
    monkeypatch.setattr(per_query, "_PARTS", parts)
    monkeypatch.setattr(per_query, "_SCORES", 1 << 9)
    monkeypatch.setattr(lists_module, "_NUMBERS", parts)
    layout = random_layout(SIZES, Tables(2, table_heads, 1, 8, most=5, rule="documents"))
    bias = torch.randn(2, table_heads, *layout.kv_indices.shape[2:]).requires_grad_()
    assert_equals_reference("per_query", inputs(SIZES), layout, bias=bias, dropout=dropout(SIZES))


def test_both_ways_are_the_same_to_the_last_digit_of_fp64(monkeypatch):
    layout = random_layout(SIZES, Tables(2, 4, 1, 8, most=5, rule="documents"))
    bias = torch.randn(1, 2, *layout.kv_indices.shape[2:], dtype=torch.float64).requires_grad_()
    found = []
    for slots in (16, None):
        monkeypatch.setattr(per_query, "queries_per_tile", lambda *sizes, s=slots: s)
        given = inputs(SIZES, torch.float64)
        found.append(results("per_query", given, layout, bias=bias, dropout=dropout(SIZES)))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-12, atol=1e-12)


def test_scores_far_apart_in_different_blocks_are_merged_exactly(way):
    """A key block whose scores lie a thousand above another's takes all of the weight, without overflow."""
    sizes = Sizes(batch=1, heads=1, kv_heads=1, nq=32, nkv=32, dim=8)
    q, k, v = inputs(sizes, torch.float64)
    with torch.no_grad():
        k[:, :, 8:16] *= 1000
    table = torch.arange(4, dtype=torch.int32).expand(1, 1, 32, 4).contiguous()
    layout = BlockLayout(table, 1, 8, interval_mask(32, causal=False), no_dense_rows("cpu"))
    assert_equals_reference("per_query", (q, k, v), layout, tolerance=1e-9)


@pytest.mark.parametrize("slots", [16, 32])
@pytest.mark.parametrize("sharing", [1, 3])
@pytest.mark.parametrize("counted", [True, False])
def test_tiles_bring_every_query_to_each_of_its_blocks_once(counted, sharing, slots):
    g = torch.Generator().manual_seed(1)
    lists, entries, blocks = 50, 4, 6
    block = torch.rand(lists, blocks + 1, generator=g).argsort(-1)[:, :entries].sort(-1).values  # `blocks`: an end
    of_block = readers(block, blocks, sharing)
    used, most = tiles_of(of_block, slots), most_tiles(blocks, lists * entries, sharing, slots)
    assert used < most
    tiles = block_tiles(block, of_block, sharing, slots, used if counted else most)
    places = itertools.product(range(len(tiles.block_T)), range(slots))
    pairs = [(int(tiles.block_T[t]), int(tiles.query_TP[t, p])) for t, p in places]
    wanted = [(int(b), r) for r in range(lists * sharing) for b in block[r // sharing] if b < blocks]
    assert sorted(pair for pair in pairs if pair[1] >= 0) == sorted(wanted)
    assert tiles.block_T[:used].tolist() == sorted(tiles.block_T[:used].tolist())
    assert (tiles.query_TP[:used, 0] >= 0).all() and (tiles.query_TP[used:] == -1).all()
    assert (tiles.block_T[used:] == block[0, 0]).all()  # a block that query 0, which stands in there, reads
    for r, k in itertools.product(range(lists * sharing), range(entries)):
        at, of = int(tiles.position_RK[r, k]), int(block[r // sharing, k])
        assert at == len(pairs) if of == blocks else pairs[at] == (of, r)


@pytest.mark.parametrize("sharing", [1, 3])
@pytest.mark.parametrize("places", [16, 128])
def test_no_readers_fill_more_tiles_than_the_bound(places, sharing):
    """The worst case is one query more than whole tiles in every block."""
    for blocks, of_each in ((1, 1), (7, 1), (7, places + 1), (5, 3 * places), (40, 2 * places + 1)):
        entries = blocks * of_each
        of_block = torch.full((blocks,), of_each * sharing)
        assert tiles_of(of_block, places) <= most_tiles(blocks, entries, sharing, places)
        assert most_tiles(blocks, entries, sharing, places) <= tiles_of(of_block, places) + blocks


def test_the_way_is_a_matter_of_how_many_rows_chose_the_same_block():
    alone, crowd = torch.tensor([1, 0, 1, 1]), torch.tensor([500, 0, 300, 7])
    assert queries_per_tile(alone, 3, 1, 64) is None
    assert queries_per_tile(crowd, int(crowd.sum()), 1, 64) in (64, 128)
    assert queries_per_tile(crowd, int(crowd.sum()), 1, 64) == queries_per_tile(crowd.flip(0), int(crowd.sum()), 1, 64)
    assert queries_per_tile(torch.tensor([16, 16]), 32, 1, 64) == 16  # the first of equal costs, and no slot left over
    assert queries_per_tile(torch.zeros(4, dtype=torch.int64), 0, 1, 64) == 16


@pytest.mark.parametrize("sharing", [1, 4, 16])
def test_single_keys_are_gathered_however_many_rows_chose_them(sharing: int):
    """A tile against one key is no matrix product, and its slots cost what they cost against 64 keys."""
    crowd = torch.full((100,), 5000 * sharing)
    assert queries_per_tile(crowd, 500_000, sharing, 1) is None
    assert queries_per_tile(crowd, 500_000, sharing, 64) is not None


def test_a_single_query_reads_its_blocks_from_a_long_past():
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=1, nkv=1000, dim=32)
    assert_equals_reference("per_query", inputs(sizes), random_layout(sizes, Tables(2, 4, 1, 64, most=5, rule="both")))


@pytest.mark.parametrize("blocks", [8, 32])
def test_gathered_keys_of_all_rows_never_exist_at_once(blocks, way, watched, monkeypatch):
    """The largest tensor is the table's size times a few, however many keys a row reads."""
    monkeypatch.setattr(per_query, "_PARTS", 1 << 15)
    monkeypatch.setattr(lists_module, "_NUMBERS", 1 << 15)
    monkeypatch.setattr(per_query, "_SCORES", 1 << 15)
    n, dim, size = 512, 16, 16
    sizes = Sizes(batch=1, heads=2, kv_heads=2, nq=n, nkv=n, dim=dim)
    layout = random_layout(sizes, Tables(1, 2, 1, size, most=blocks))
    largest, _ = watched(lambda: results("per_query", inputs(sizes), layout))
    assert largest <= max(4 * 2 * n * dim, 2 * layout.kv_indices.numel(), 1 << 16)
    assert largest < 2 * n * blocks * size * dim / 16


def test_equal_inputs_give_equal_bits_in_any_batch(way):
    """A sample's results depend neither on its neighbours nor on its place."""
    q, k, v = inputs(SIZES)
    layout = random_layout(SIZES, Tables(1, 2, 1, 8, most=4))
    both = block_sparse_attention(q, k, v, layout, backend="per_query")
    swapped = block_sparse_attention(q.flip(0), k.flip(0), v.flip(0), layout, backend="per_query")
    torch.testing.assert_close(both, swapped.flip(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(both, block_sparse_attention(q, k, v, layout, backend="per_query"))
