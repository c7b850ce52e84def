"""The two hierarchies against their definitions: strided blocks, and summaries that share out the past."""

import pytest
import torch
from pattern_definitions import CASES, Case, allowed_pairs, hold_some, spread, tiles_read
from torch.nn.functional import pad

from lightsparse.patterns import Hierarchical, LocalWindow, PooledHierarchy
from lightsparse.patterns.mask import ALWAYS

SELECTED = [
    ((1, 1),),
    ((20, 1), (70, 2), (None, 5)),
    ((33, 1), (None, 3)),
    ((None, 7), (100, 3)),
]
POOLED = [
    PooledHierarchy(9, ((None, 4),)),
    PooledHierarchy(9, ((25, 4), (None, 16))),
    PooledHierarchy(1, ((1, 3), (20, 6), (None, 30))),
    PooledHierarchy(50, ((7, 5), (None, 40))),
    PooledHierarchy(16, ((64, 16), (None, 64))),
    PooledHierarchy(3, ((None, 200),)),
]
CAUSAL = [case for case in CASES if case.causal and case.n < 1000] + [
    Case(333, 8, True, True),
    Case(1, 16, True, False),
]
POOLED_CASES = [(pattern, case) for pattern in POOLED for case in CAUSAL]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("levels", SELECTED, ids=str)
def test_selection_reads_every_stride_th_block_of_each_window_and_its_own(levels, case):
    I, J = torch.arange(case.blocks)[:, None], torch.arange(case.blocks)
    tiles = (I == J).expand(1, case.kv_heads, -1, -1)
    for window, stride in levels:
        tiles = tiles | (tiles_read(LocalWindow(window or 1 << 40), case) & (J % stride == stride - 1))
    allowed = allowed_pairs(case)[:, None]
    layout = case.layout(Hierarchical(levels))
    assert torch.equal(*torch.broadcast_tensors(layout.to_dense(), spread(tiles, case) & allowed))
    assert torch.equal(*torch.broadcast_tensors(layout.block_map(), tiles & hold_some(allowed, case.block)))


def coverage(layout, segments):
    """How often each query reads each token, by itself or through a summary: [B, Nq, tokens]."""
    stands_for = torch.zeros(layout.num_keys, layout.num_tokens)
    for level in segments:
        for g in range(level.count):
            key = level.first_block * layout.kv_block + g
            stands_for[key, g * level.stride : (g + 1) * level.stride] = 1
    return layout.to_dense()[:, 0].float() @ stands_for


@pytest.mark.parametrize(("pattern", "case"), POOLED_CASES, ids=str)
def test_every_query_covers_every_past_token_of_its_document_exactly_once(pattern, case):
    covered = coverage(case.layout(pattern), pattern.segments(case.n, case.block))
    assert torch.equal(*torch.broadcast_tensors(covered, allowed_pairs(case).float()))


@pytest.mark.parametrize(("pattern", "case"), POOLED_CASES, ids=str)
def test_a_tile_is_listed_where_some_pair_of_it_is_read(pattern, case):
    layout = case.layout(pattern)
    pairs = layout.mask.to_dense()[:, 0]
    pairs = pad(pairs, (0, -pairs.shape[2] % case.block, 0, -case.n % case.block))
    needed = pairs.unflatten(2, (-1, case.block)).unflatten(1, (-1, case.block)).any(-1).any(2)
    listed = layout.block_map()[:, 0]
    if case.packed:  # one tile of each level in a row may hold only summaries that are cut or of another document
        levels = len(pattern.segments(case.n, case.block)) - 1
        assert not (needed & ~listed).any() and int((listed & ~needed).sum(-1).max()) <= levels
    else:
        assert torch.equal(listed, needed)


def test_tokens_and_summaries_hand_over_where_the_definition_says():
    pattern = PooledHierarchy(10, ((30, 4), (None, 8)))
    layout = pattern.layout(200, block=16)
    tokens, fine, coarse = pattern.segments(200, 16)
    reads = layout.to_dense()[0, 0]
    of_token, of_fine, of_coarse = (
        reads[:, 21],
        reads[:, fine.first_block * 16 + 5],
        reads[:, coarse.first_block * 16 + 2],
    )
    assert of_token.nonzero().flatten().tolist() == list(range(21, 24 + 10))  # token 21 lies in group [20, 24)
    assert of_fine.nonzero().flatten().tolist() == list(range(24 + 10, 24 + 30))  # and in group [16, 24)
    assert of_coarse.nonzero().flatten().tolist() == list(range(24 + 30, 200))
    assert (tokens.count, fine.count, coarse.count) == (200, (199 - 10) // 4, (199 - 30) // 8)


def test_what_a_border_cuts_stays_at_the_finer_level_to_the_end_of_its_document():
    documents = torch.zeros(1, 200, dtype=torch.int32)
    documents[:, 70:] = 1
    documents[:, 180:] = 2
    pattern = PooledHierarchy(8, ((24, 4), (None, 16)))
    layout = pattern.layout(200, block=16, documents=documents)
    _, fine, _ = pattern.segments(200, 16)
    reads = layout.to_dense()[0, 0]
    assert reads[179, 70:72].all()  # group [68, 72) holds the border at 70
    assert not reads[:, fine.first_block * 16 + 17].any()
    assert reads[179, fine.first_block * 16 + 18 : fine.first_block * 16 + 20].all()  # [72, 80): group [64, 80) is cut
    assert not reads[179, 72:80].any()
    assert not reads[180:, :180].any()


@pytest.mark.parametrize("n", [257, 333])
@pytest.mark.parametrize("packed", [False, True])
def test_density_counts_summaries_above_the_line_and_tokens_below(n, packed):
    case = Case(n, 16, True, packed)
    layout = case.layout(POOLED[1])
    blocks = -(-case.n // 16)
    q_area = torch.full((blocks,), 16.0)
    q_area[-1] = case.n % 16
    k_area = torch.full((layout.num_kv_blocks,), 16.0)
    k_area[blocks - 1] = case.n % 16  # the last tokens' block; every block of summaries is computed whole
    dense = hold_some(allowed_pairs(case), 16).float()
    above = torch.einsum("bij,i,j->b", layout.block_map()[:, 0].float(), q_area, k_area)
    below = torch.einsum("bij,i,j->b", dense, q_area, k_area[:blocks])
    assert layout.density() == pytest.approx(float((above / below).mean()))
    assert layout.density() < LocalWindow(n).layout(n, block=16).density() == 1.0


def test_without_a_reader_there_is_no_summary_and_the_layout_is_plain_dense():
    layout = PooledHierarchy(1 << 40, ((None, 8),)).layout(111, block=16)
    assert layout.num_keys == layout.num_tokens == 111 and layout.density() == 1.0
    assert (layout.mask.visible_until == ALWAYS).all()
    assert torch.equal(layout.to_dense()[0, 0], torch.ones(111, 111, dtype=torch.bool).tril())


@pytest.mark.parametrize("packed", [False, True])
def test_rows_and_single_queries_are_parts_of_the_whole(packed):
    case = Case(111, 16, True, packed)
    whole = case.layout(POOLED[1])
    for rows in (range(0, 1), range(2, 5), range(6, 7), range(3, 3)):
        part = case.layout(POOLED[1], rows)
        tokens = slice(rows.start * 16, min(rows.stop * 16, 111))
        assert torch.equal(part.to_dense(), whole.to_dense()[:, :, tokens])
    single = case.layout(POOLED[1], range(2, 7)).per_token(5, 79)
    assert torch.equal(single.to_dense(), whole.to_dense()[:, :, 37:])
    assert single.num_tokens == 111 and single.q_block == 1


@pytest.mark.parametrize("packed", [False, True])
def test_full_tiles_and_flex_agree_with_the_pairs_read(packed):
    case = Case(176, 16, True, packed)
    layout = case.layout(PooledHierarchy(40, ((None, 4),)))
    read, listed, table = layout.to_dense()[:, 0], layout.block_map()[:, 0], layout.kv_indices[:, 0].long()
    whole = read.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).all(-1).all(2)
    assert torch.equal(layout.full_tiles[:, 0], whole.gather(2, table.clamp(min=0)) & (table >= 0))
    assert packed or whole[:, :, 11:].any()  # some of summaries are full

    flex = layout.to_flex(batch=len(read))
    assert torch.equal(flex.to_dense()[:, 0].bool(), listed)
    b, i, j = (torch.arange(n) for n in (len(read), 176, layout.num_keys))
    by_pair = flex.mask_mod(b[:, None, None], torch.tensor(0), i[:, None], j)
    assert torch.equal(by_pair & spread_over_keys(listed, layout), read)


def spread_over_keys(tiles, layout):
    return tiles.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : layout.num_queries, : layout.num_keys]


def test_a_million_tokens_take_a_narrow_table():
    layout = PooledHierarchy(512, ((8192, 64), (None, 512))).layout(1 << 20, block=128)
    assert layout.kv_indices.shape[-1] <= 6 + 3 + 16  # window; 8192 / 64 / 128 and its neighbours; 2²⁰ / 512 / 128
    assert layout.num_keys < 1.02 * 2**20


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Hierarchical(()), "levels is empty"),
        (lambda: Hierarchical(((0, 1),)), "at least 1"),
        (lambda: Hierarchical(((4, 0),)), "at least 1"),
        (lambda: PooledHierarchy(0, ((None, 4),)), "at least 1"),
        (lambda: PooledHierarchy(8, ()), "it needs a level of stride 1"),
        (lambda: PooledHierarchy(8, ((30, 4),)), "the last level reaches over the whole past"),
        (lambda: PooledHierarchy(8, ((None, 4), (None, 8))), "only that one"),
        (lambda: PooledHierarchy(8, ((30, 4), (None, 6))), "not 6 after 4"),
        (lambda: PooledHierarchy(8, ((30, 4), (None, 4))), "not 4 after 4"),
        (lambda: PooledHierarchy(8, ((None, 4),)).layout(64, causal=False), "causal only"),
        (lambda: (PooledHierarchy(8, ((None, 4),)) | LocalWindow(4)).layout(64), "no part of a union"),
        (lambda: PooledHierarchy(8, ((None, 4),)).layout(0), "seq_len is 0"),
    ],
)
def test_what_makes_no_hierarchy_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
