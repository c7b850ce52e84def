"""Every pattern against a literal reading of its definition, at odd lengths, packed or not."""

import pytest
import torch
from pattern_definitions import CASES, Case, allowed_pairs, hold_some, spread, tiles_read

from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, Strided

PATTERNS = [
    LocalWindow(1),
    LocalWindow(2),
    LocalWindow(17),
    LocalWindow(65),
    LocalWindow(1 << 40),
    GlobalTokens(1),
    GlobalTokens(20),
    GlobalTokens(1 << 40),
    Strided(1),
    Strided(3),
    Strided(1000),
    BlockDilated((64, 192), (1, 2)),
    BlockDilated((128, 1 << 20), (3, 5)),
]
BIDIRECTIONAL = [GlobalTokens(0, trailing=1), GlobalTokens(3, trailing=70), GlobalTokens(0, trailing=1 << 40)]
BOTH_WAYS = [case for case in CASES if not case.causal]
CHECKED = [(p, case) for p in PATTERNS for case in CASES] + [(p, case) for p in BIDIRECTIONAL for case in BOTH_WAYS]


@pytest.mark.parametrize(("pattern", "case"), CHECKED, ids=str)
def test_a_layout_reads_exactly_what_its_definition_says(pattern, case):
    layout = case.layout(pattern)
    tiles, allowed = tiles_read(pattern, case), allowed_pairs(case)[:, None]
    assert torch.equal(*torch.broadcast_tensors(layout.to_dense(), spread(tiles, case) & allowed))
    listed = layout.block_map()
    listed[:, :, layout.dense_rows.long()] = False
    wanted = tiles & hold_some(allowed, case.block)  # no tile is listed in vain
    wanted = wanted.expand(max(len(listed), len(wanted)), -1, -1, -1).clone()
    wanted[:, :, layout.dense_rows.long()] = False
    assert torch.equal(*torch.broadcast_tensors(listed, wanted))


@pytest.mark.parametrize(("pattern", "case"), CHECKED[::3], ids=str)
def test_a_row_of_the_table_is_ascending_without_repeats_and_padded_at_its_end(pattern, case):
    table = case.layout(pattern).kv_indices
    assert table.dtype == torch.int32
    assert int((table >= 0).sum(-1).max()) == table.shape[3]  # no wider than its longest row
    ranked = torch.where(table < 0, case.blocks + torch.arange(table.shape[3]), table)
    assert (ranked.diff(dim=-1) > 0).all()
    assert (table < case.blocks).all()


PARTS_OF_A_SEQUENCE = [
    Case(n, b, causal, packed)
    for n, b in [(111, 16), (1000, 64)]
    for causal in (True, False)
    for packed in (True, False)
]


@pytest.mark.parametrize("case", PARTS_OF_A_SEQUENCE, ids=str)
@pytest.mark.parametrize("pattern", [*PATTERNS[2::2], LocalWindow(20) | GlobalTokens(4) | Strided(3)], ids=str)
def test_a_range_of_rows_is_that_part_of_the_whole(pattern, case):
    whole = case.layout(pattern)
    last = case.blocks - 1
    for rows in (range(0, 1), range(2, 5), range(last, last + 1), range(1, last + 1)):
        part = case.layout(pattern, rows)
        tokens = slice(rows.start * case.block, min(rows.stop * case.block, case.n))
        assert torch.equal(part.to_dense(), whole.to_dense()[:, :, tokens])
        assert torch.equal(part.block_map(), whole.block_map()[:, :, rows.start : rows.stop])
        assert torch.equal(part.mask.q_pos[0], torch.arange(tokens.start, tokens.stop, dtype=torch.int32))


@pytest.mark.parametrize("pattern", [*PATTERNS[2::2], LocalWindow(20) & GlobalTokens(4)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_no_rows_give_an_empty_table(pattern, causal):
    layout = Case(111, 16, causal, packed=False).layout(pattern, range(3, 3))
    assert layout.num_queries == 0 and layout.num_keys == 111 and layout.num_q_blocks == 0


def test_a_single_document_per_sample_is_no_documents():
    plain = LocalWindow(20).layout(63, block=16)
    ids = torch.tensor([3, 8], dtype=torch.int32)[:, None].expand(2, 63)
    packed = LocalWindow(20).layout(63, block=16, documents=ids)
    assert packed.mask.q_doc is None and torch.equal(packed.kv_indices, plain.kv_indices)


def test_heads_of_a_dilated_pattern_cover_every_block_together():
    n, block, rate = 1000, 16, 4
    layout = BlockDilated((256,), (rate,)).layout(n, block=block, heads=8, kv_heads=rate, causal=False)
    I, J = torch.arange(63)[:, None], torch.arange(63)
    assert torch.equal(layout.block_map().any(1)[0], I // 16 == J // 16)


def test_packed_equals_separate_where_documents_start_on_whole_blocks_and_strides():
    pattern = LocalWindow(20) | GlobalTokens(3) | Strided(2) | BlockDilated((64,), (2,))
    lengths = [128, 64, 111]
    ids = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None]
    for causal in (True, False):
        packed = pattern.layout(sum(lengths), block=16, heads=4, kv_heads=2, causal=causal, documents=ids).to_dense()
        start = 0
        for length in lengths:
            alone = pattern.layout(length, block=16, heads=4, kv_heads=2, causal=causal).to_dense()
            assert torch.equal(packed[:, :, start : start + length, start : start + length], alone)
            start += length
