import matplotlib.image
import pytest
import torch

from lightsparse.analysis import pattern_picture
from lightsparse.analysis.pattern_picture import dense_map, distinct_heads, first_sample, image, save
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, Strided

COMPUTED, SKIPPED, NOTHING = (torch.tensor(c) for c in (pattern_picture._COMPUTED, pattern_picture._SKIPPED, (1, 1, 1)))


def test_each_tile_has_the_colour_of_what_happens_there():
    layout = (LocalWindow(20) | GlobalTokens(1)).layout(150, block=16)
    colours, read = image(layout), layout.block_map()[0, 0]
    past = torch.ones_like(read).tril()
    assert colours.shape == (10, 10, 3)
    assert torch.allclose(colours[read], COMPUTED)
    assert torch.allclose(colours[past & ~read], SKIPPED)
    assert torch.allclose(colours[~past], NOTHING.float())
    assert (past & ~read).any()


def test_the_pale_part_is_what_dense_attention_computes():
    documents = torch.zeros(1, 160, dtype=torch.int32)
    documents[:, 50:] = 1
    layout = LocalWindow(1000).layout(160, block=16, documents=documents)
    assert torch.equal(dense_map(layout), layout.block_map()[0, 0])
    both_ways = LocalWindow(5).layout(100, block=16, causal=False)
    assert dense_map(both_ways).all()


def test_heads_with_one_pattern_share_a_panel():
    layout = BlockDilated((64, 256), (1, 2)).layout(256, block=16, heads=4)
    assert [heads for heads, _ in distinct_heads(layout)] == [[0, 2], [1, 3]]
    assert [heads for heads, _ in distinct_heads(LocalWindow(5).layout(64, block=16, heads=4))] == [[0]]


def test_a_large_map_is_averaged_and_a_lone_stripe_stays_visible(monkeypatch):
    monkeypatch.setattr(pattern_picture, "MAX_PIXELS", 16)
    layout = (LocalWindow(1) | Strided(16)).layout(64 * 4, block=4)
    colours = image(layout)
    assert colours.shape == (16, 16, 3)
    stripe, beside = colours[12, 3], colours[12, 5]
    assert torch.allclose(beside, SKIPPED)
    assert (beside - stripe).max() > 0.2


def test_the_first_sample_is_drawn():
    documents = torch.zeros(2, 64, dtype=torch.int32)
    documents[1, 32:] = 1
    layout = LocalWindow(64).layout(64, block=16, documents=documents)
    alone = LocalWindow(64).layout(64, block=16)
    assert torch.equal(first_sample(layout).block_map(), alone.block_map())


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_the_file_is_a_picture_readable_on_a_phone(tmp_path, heads):
    layout = BlockDilated((64, 256), (1, heads)).layout(1000, block=16, heads=heads)
    path = save(layout, tmp_path / "plots" / "pattern.png", "block_sparse")
    height, width = matplotlib.image.imread(path).shape[:2]
    assert 1000 <= width <= 1500  # at most two panels side by side
    assert height >= width
