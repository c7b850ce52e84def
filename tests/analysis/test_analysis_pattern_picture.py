import matplotlib.image
import pytest
import torch

from lightsparse.analysis import pattern_picture, tile_map
from lightsparse.analysis.pattern_picture import image, save, save_gallery
from lightsparse.analysis.tile_map import HeadMap, TileMap, of_layout
from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, Strided

COMPUTED, SKIPPED, NOTHING = (torch.tensor(c) for c in (pattern_picture._COMPUTED, pattern_picture._SKIPPED, (1, 1, 1)))


def colours_of(drawn):
    return image(drawn, drawn.panels[0])


def half_read() -> TileMap:
    """2 × 2 tiles, of which the lower left one is read by a half."""
    read = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    return TileMap([HeadMap([0], read, None)], 1, read.ceil(), 0.8, (16, 16), 16, 0, 32, 32, 32)


def test_each_tile_has_the_colour_of_what_happens_there():
    layout = (LocalWindow(20) | GlobalTokens(1)).layout(150, block=16)
    colours, read = colours_of(of_layout(layout)), layout.block_map()[0, 0]
    past = torch.ones_like(read).tril()
    assert colours.shape == (10, 10, 3)
    assert torch.allclose(colours[read], COMPUTED)
    assert torch.allclose(colours[past & ~read], SKIPPED)
    assert torch.allclose(colours[~past], NOTHING.float())
    assert (past & ~read).any()


def test_a_tile_read_in_part_is_between_the_two_colours_and_explained():
    colour = colours_of(half_read())[1, 0]
    assert (colour > COMPUTED).all() and (colour < SKIPPED).all()
    whole = of_layout(LocalWindow(20).layout(64, block=16))
    labels = [[label for _, label in pattern_picture._legend(maps)] for maps in ([half_read()], [whole])]
    assert labels == [["computed", "partly computed", "only in dense"], ["computed", "only in dense"]]


def test_a_large_map_is_averaged_and_a_lone_stripe_stays_visible(monkeypatch):
    monkeypatch.setattr(tile_map, "MAX_PIXELS", 16)
    colours = colours_of(of_layout((LocalWindow(1) | Strided(16)).layout(64 * 4, block=4)))
    assert colours.shape == (16, 16, 3)
    stripe, beside = colours[12, 3], colours[12, 5]
    assert torch.allclose(beside, SKIPPED)
    assert (beside - stripe).max() > 0.2


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_the_file_is_a_picture_readable_on_a_phone(tmp_path, heads):
    layout = BlockDilated((64, 256), (1, heads)).layout(1000, block=16, heads=heads)
    path = save(layout, tmp_path / "plots" / "pattern.png", "block_sparse")
    height, width = matplotlib.image.imread(path).shape[:2]
    assert 1000 <= width <= 1500  # at most two panels side by side
    assert height >= width


@pytest.mark.parametrize(("variants", "grid"), [(1, (3, 1)), (7, (4, 2)), (8, (3, 3)), (13, (5, 3))])
def test_a_gallery_has_a_place_for_each_variant_and_the_legend(tmp_path, variants, grid):
    named = {f"variant_{i}": (half_read(), "untrained, random input" if i else "") for i in range(variants)}
    height, width = matplotlib.image.imread(save_gallery(named, tmp_path / "all.png")).shape[:2]
    assert (round(width / 400), round(height / 520)) == grid
