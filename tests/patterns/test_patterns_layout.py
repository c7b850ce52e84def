"""BlockLayout: its pictures, its density, the tiles without a mask, its rows one by one, FlexAttention's form."""

from dataclasses import replace

import pytest
import torch
from pattern_definitions import CASES, allowed_pairs, hold_some

from lightsparse.patterns import BlockDilated, BlockLayout, GlobalTokens, LocalWindow, Strided, interval_mask
from lightsparse.patterns.layout import no_dense_rows

MIXED = LocalWindow(20) | GlobalTokens(4) | BlockDilated((128, 256), (1, 2))
SMALL = [case for case in CASES if case.n != 1000 or case.block == 64]


def test_the_pictures_of_a_layout_written_by_hand():
    table = torch.tensor([[[[0, -1], [0, 2], [-1, -1]]]], dtype=torch.int32)
    layout = BlockLayout(table, 2, 3, interval_mask(8, q_start=3), torch.tensor([2], dtype=torch.int32))
    assert layout.num_queries == 5 and layout.num_keys == 8
    assert layout.num_q_blocks == 3 and layout.num_kv_blocks == 3
    assert layout.block_map()[0, 0].tolist() == [[True, False, False], [True, False, True], [True, True, True]]
    read = [
        [1, 1, 1, 0, 0, 0, 0, 0],  # query 3 reads keys up to itself, of block 0 only
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],  # query 5 would read block 2, which is its future
        [1, 1, 1, 0, 0, 0, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],  # query 7, in a row that reads everything
    ]
    assert layout.to_dense()[0, 0].int().tolist() == read


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("pattern", [MIXED, GlobalTokens(20), LocalWindow(1 << 20)], ids=str)
def test_density_is_the_area_of_computed_tiles_over_that_of_dense_attention(pattern, case):
    layout = case.layout(pattern)
    dense = hold_some(allowed_pairs(case), case.block)  # tiles that dense attention over the same documents computes
    computed = layout.block_map() & dense[:, None]
    length = [min(case.block, case.n - start) for start in range(0, case.n, case.block)]
    shares = []
    for sample in range(len(computed)):
        for head in range(computed.shape[1]):
            area, of_dense = 0, 0
            for I in range(case.blocks):
                for J in range(case.blocks):
                    area += length[I] * length[J] * bool(computed[sample, head, I, J])
                    of_dense += length[I] * length[J] * bool(dense[sample % len(dense), I, J])
            shares.append(area / of_dense)
    assert layout.density() == pytest.approx(sum(shares) / len(shares), rel=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case.n == 111], ids=str)
def test_everything_has_density_one(case):
    assert case.layout(LocalWindow(case.n)).density() == 1.0
    assert case.layout(GlobalTokens(case.n)).density() == 1.0


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_full_tiles_are_the_listed_tiles_without_a_masked_pair(case, window):
    layout = case.layout(MIXED)
    masks = interval_mask(case.n, causal=case.causal, window=window, sinks=5, documents=case.documents)
    layout = replace(layout, mask=masks)
    pairs = masks.to_dense()
    missing = -case.n % case.block
    masked = torch.nn.functional.pad(~pairs, (0, missing), value=True)  # keys past the end count as masked
    masked = torch.nn.functional.pad(masked, (0, 0, 0, missing), value=False)  # queries past the end do not
    has_masked = masked.unflatten(-1, (-1, case.block)).unflatten(-3, (-1, case.block)).any(-1).any(-2)
    tables = layout.kv_indices
    batch = max(len(tables), len(has_masked))
    tables, has_masked = tables.expand(batch, -1, -1, -1), has_masked.expand(batch, tables.shape[1], -1, -1)
    wanted = ~has_masked.gather(3, tables.clamp(min=0).long()) & (tables >= 0)
    assert torch.equal(layout.full_tiles, wanted)
    assert window or case.packed or case.n < 2 * case.block or wanted.any()


def test_an_explicit_mask_leaves_no_tile_full():
    layout = LocalWindow(64).layout(63, block=16)
    allowing_all = replace(layout, mask=replace(layout.mask, dense=torch.ones(1, 1, 63, 63, dtype=torch.bool)))
    assert layout.full_tiles.any() and not allowing_all.full_tiles.any()


@pytest.mark.parametrize("case", [case for case in CASES if case.n == 111], ids=str)
def test_one_row_per_query_reads_the_same(case):
    layout = case.layout(MIXED)
    for start, stop in [(0, 111), (5, 6), (17, 80), (110, 111)]:
        rows = layout.per_token(start, stop)
        assert rows.q_block == 1 and rows.num_q_blocks == stop - start
        assert torch.equal(rows.to_dense(), layout.to_dense()[:, :, start:stop])
    of_part = case.layout(MIXED, range(2, case.blocks)) if case.blocks > 2 else layout
    first = 2 * case.block if case.blocks > 2 else 0
    rows = of_part.per_token(3, of_part.num_queries)
    assert torch.equal(rows.to_dense(), layout.to_dense()[:, :, first + 3 :])


@pytest.mark.parametrize("case", [case for case in CASES if case.n != 1000], ids=str)
def test_the_block_mask_lists_each_tile_once_as_full_or_partial(case):
    layout = case.layout(MIXED)
    blocks = layout.to_flex(batch=2, heads=4)
    partial, full = (_tiles_of(*lists) for lists in _lists(blocks))
    tiles = layout.block_map().repeat_interleave(4 // layout.kv_indices.shape[1], 1).expand(2, 4, -1, -1)
    assert not (partial & full).any()
    assert torch.equal(partial | full, tiles)
    every_pair = hold_some(~layout.mask.to_dense(), case.block).logical_not()  # of whole tiles; short ones are partial
    assert (full <= every_pair).all()
    assert blocks.seq_lengths == (case.n, case.n) and (case.block, case.block) == blocks.BLOCK_SIZE


def _lists(blocks):
    return [(blocks.kv_num_blocks, blocks.kv_indices), (blocks.full_kv_num_blocks, blocks.full_kv_indices)]


def _tiles_of(count: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    listed = torch.arange(ids.shape[-1]) < count[..., None]
    return torch.zeros_like(listed).scatter(-1, ids.long(), listed)


def test_an_explicit_mask_is_no_block_mask():
    layout = LocalWindow(64).layout(63, block=16)
    layout = replace(layout, mask=replace(layout.mask, dense=torch.ones(1, 1, 63, 63, dtype=torch.bool)))
    with pytest.raises(ValueError, match="FlexAttention takes no dense mask, use backend=blocked"):
        layout.to_flex()


def test_a_million_tokens_need_memory_for_what_is_read_and_no_more(largest_tensor):
    n, block = 1 << 20, 128
    made = []

    def build():
        layout = (LocalWindow(4096) | GlobalTokens(4) | Strided(64)).layout(n, block=block, heads=16, kv_heads=4)
        made.append((layout, layout.density(), layout.full_tiles))

    largest = largest_tensor(build)
    layout, density, _ = made[0]
    rows, width = layout.kv_indices.shape[2:]
    assert (rows, width) == (8192, 4096 // 128 + 1 + 1 + 8192 // 64 - 1)
    assert largest <= 2 * rows * width
    assert 0.02 < density < 0.04


@pytest.mark.parametrize("packed", [False, True])
def test_a_million_tokens_read_from_both_sides_need_no_square_of_blocks(largest_tensor, packed):
    n, block = 1 << 20, 128
    ids = (torch.arange(n, dtype=torch.int32) // 5000)[None] if packed else None
    pattern = (LocalWindow(1024) & GlobalTokens(2048)) | GlobalTokens(4)
    largest = largest_tensor(lambda: pattern.layout(n, block=block, causal=False, documents=ids))
    assert largest <= 200 * 8192


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            torch.zeros(1, 1, 3, 1, dtype=torch.int32),
            r"kv_indices has shape \(1, 1, 3, 1\); 63 queries in blocks of 16",
        ),
        (torch.zeros(1, 4, 1, dtype=torch.int32), r"need \[B\|1, H\|Hkv\|1, 4, K\]"),
        (torch.zeros(1, 1, 4, 1), "kv_indices is torch.float32; block ids are torch.int32"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, says):
    with pytest.raises(ValueError, match=says):
        BlockLayout(table, 16, 16, interval_mask(63), no_dense_rows("cpu"))


WRONG = {
    "seq_len is 0": lambda: LocalWindow(4).layout(0),
    "block is 0": lambda: LocalWindow(4).layout(63, block=0),
    "heads is 0": lambda: LocalWindow(4).layout(63, heads=0),
    "kv_heads must divide heads": lambda: LocalWindow(4).layout(63, heads=4, kv_heads=3),
    r"rows is range\(0, 5\); it must be a plain range within 0 … 4": lambda: LocalWindow(4).layout(
        63, block=16, rows=range(5)
    ),
    r"rows is range\(-1, 2\)": lambda: LocalWindow(4).layout(63, block=16, rows=range(-1, 2)),
    r"rows is range\(0, 4, 2\)": lambda: LocalWindow(4).layout(63, block=16, rows=range(0, 4, 2)),
    r"documents has shape \(1, 62\)": lambda: LocalWindow(4).layout(63, documents=torch.zeros(1, 62)),
    r"documents has shape \(63,\)": lambda: LocalWindow(4).layout(63, documents=torch.arange(63)),
    "document ids decrease": lambda: LocalWindow(4).layout(3, documents=torch.tensor([[2, 1, 2]])),
    "document ids decrease along": lambda: LocalWindow(4).layout(4, documents=torch.tensor([[0, 1, 1, 0]])),
    "LocalWindow.window is 0": lambda: LocalWindow(0),
    "Strided.stride is 0": lambda: Strided(0),
    "GlobalTokens.n is 0 and trailing is 0": lambda: GlobalTokens(0),
    "GlobalTokens.n is -1": lambda: GlobalTokens(-1, trailing=5),
    "GlobalTokens.trailing is 3; trailing tokens lie in the future": lambda: GlobalTokens(1, 3).layout(63, block=16),
    "they need the same number of entries": lambda: BlockDilated((64,), (1, 2)),
    "at least one": lambda: BlockDilated((), ()),
    "BlockDilated.dilation_rates is": lambda: BlockDilated((64,), (0,)),
    "must be a multiple of the block, 64 tokens": lambda: BlockDilated((96,), (1,)).layout(111, block=64),
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_sizes_are_one_sentence(says):
    with pytest.raises(ValueError, match=says):
        WRONG[says]()


def test_keys_that_close_per_sample_make_tiles_full_per_sample():
    layout = LocalWindow(64).layout(64, block=16)
    closes = torch.full((2, 64), 64, dtype=torch.int32)
    closes[1, 20] = 50  # block 1 of sample 1 has a key that the last row does not read
    full = replace(layout, mask=replace(layout.mask, visible_until=closes)).full_tiles
    assert full[0, 0, 3].tolist() == [True, True, True, False]
    assert full[1, 0, 3].tolist() == [True, False, True, False]
