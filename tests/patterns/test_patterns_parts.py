"""Parts of a layout say exactly what the whole says about them."""

import pytest
import torch

from lightsparse.patterns import BigBird, GlobalTokens, LocalWindow, Strided
from lightsparse.patterns.parts import members, named_blocks, of_keys, of_rows

N, BLOCK = 205, 16  # 13 blocks, the last one short
LAYOUTS = {
    "window": (LocalWindow(40), {}),
    "per head": (BigBird(32, 8, 2, seed=1, per_head=True), {"heads": 4, "kv_heads": 2}),
    "dense rows": (GlobalTokens(20) | Strided(3), {"causal": False}),
    "documents": (LocalWindow(60), {"documents": torch.tensor([[0] * 70 + [1] * 135, [0] * 205])}),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rows", [[0], [12], [3, 4, 9, 12], []])
def test_rows_of_a_layout_read_what_they_read_in_the_whole(name, rows):
    pattern, options = LAYOUTS[name]
    layout = pattern.layout(N, block=BLOCK, **options)
    part = of_rows(layout, torch.tensor(rows, dtype=torch.int64))
    queries = members(torch.tensor(rows, dtype=torch.int64), BLOCK, N)
    assert part.num_queries == len(queries)
    assert torch.equal(part.to_dense(), layout.to_dense()[:, :, queries])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("blocks", [[0, 5, 12], [1, 2, 3, 4, 5, 6], list(range(13))])
def test_keys_of_a_layout_are_read_by_whom_they_are_read_in_the_whole(name, blocks):
    pattern, options = LAYOUTS[name]
    layout = pattern.layout(N, block=BLOCK, **options)
    part = of_keys(layout, torch.tensor(blocks))
    keys = members(torch.tensor(blocks), BLOCK, N)
    assert part.num_keys == len(keys)
    assert torch.equal(part.to_dense(), layout.to_dense()[..., keys])


@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_that_a_part_names_are_enough_and_keep_the_table_in_place(name):
    pattern, options = LAYOUTS[name]
    rows = torch.tensor([2, 7, 8])
    part = of_rows(pattern.layout(N, block=BLOCK, **options), rows)
    named = named_blocks(part)
    blocks = named.flatten(0, 1).any(0).nonzero().flatten()
    fewer = of_keys(part, blocks)
    assert fewer.kv_indices.shape == part.kv_indices.shape
    assert torch.equal(
        blocks[fewer.kv_indices.clamp(min=0)][part.kv_indices >= 0], part.kv_indices[part.kv_indices >= 0].long()
    )
    outside = torch.ones(N, dtype=torch.bool)
    outside[members(blocks, BLOCK, N)] = False
    assert not part.to_dense()[..., outside].any()
