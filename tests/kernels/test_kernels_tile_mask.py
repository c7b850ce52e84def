"""Masks of tiles: together with the full tiles they say exactly what the layout says, row by row."""

import pytest
import torch
from kernel_cases import Sizes, Tables, random_layout

from lightsparse.kernels import tile_mask
from lightsparse.kernels.tile_mask import TileMasks

SIZES = Sizes(batch=2, heads=4, kv_heads=2, nq=50, nkv=63)


def walk(layout):
    """Row → (list of (table, block, bias), may_be_empty), as a kernel asks for them."""
    table_TNK = layout.kv_indices.expand(layout.full_tiles.shape[0], -1, -1, -1).flatten(0, 1)
    masks = TileMasks(layout, table_TNK, torch.float32)
    return table_TNK, [masks.row(row) for row in range(layout.num_q_blocks)]


@pytest.mark.parametrize("rule", ["causal", "both", "documents", "intervals"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize(("q_block", "kv_block"), [(16, 16), (8, 20), (1, 16), (64, 64)])
def test_full_tiles_and_masked_tiles_give_the_whole_rule(q_block, kv_block, batch, heads, rule):
    layout = random_layout(SIZES, Tables(batch, heads, q_block, kv_block, most=4, rule=rule))
    allowed = layout.to_dense()
    table_TNK, rows = walk(layout)
    samples = len(table_TNK) // layout.kv_indices.shape[1]
    full = layout.full_tiles.flatten(0, 1)
    rebuilt = torch.zeros(len(table_TNK), layout.num_q_blocks * q_block, layout.num_kv_blocks * kv_block).bool()
    for n, row in enumerate(rows):
        queries = slice(n * q_block, (n + 1) * q_block)
        for t, block, bias in row.tiles:
            assert bias.shape == (q_block, kv_block) and ((bias == 0) | (bias == float("-inf"))).all()
            rebuilt[t, queries, block * kv_block : (block + 1) * kv_block] = bias == 0
        for t, block in zip(
            *(x.tolist() for x in (full[:, n].nonzero()[:, 0], table_TNK[:, n][full[:, n]])), strict=True
        ):
            rebuilt[t, queries, block * kv_block : (block + 1) * kv_block] = True
        of_row = allowed[:, :, queries].flatten(0, 1)
        if of_row.shape[1] and not of_row.any(-1).all():
            assert row.may_be_empty
    rebuilt = rebuilt[:, : SIZES.nq, : SIZES.nkv].unflatten(0, (samples, -1))
    assert torch.equal(*torch.broadcast_tensors(rebuilt, allowed))


def test_rows_built_a_few_at_a_time_are_the_same(monkeypatch):
    layout = random_layout(SIZES, Tables(2, 2, 8, 8, most=4, rule="intervals"))
    _, at_once = walk(layout)
    monkeypatch.setattr(tile_mask, "_CHUNK", 1)
    _, one_by_one = walk(layout)
    for a, b in zip(at_once, one_by_one, strict=True):
        assert a.may_be_empty == b.may_be_empty and len(a.tiles) == len(b.tiles)
        for (t, block, bias), (t2, block2, bias2) in zip(a.tiles, b.tiles, strict=True):
            assert (t, block) == (t2, block2) and torch.equal(bias, bias2)
