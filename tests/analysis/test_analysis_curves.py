"""The curves draw what they are given, and survive having little."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from lightsparse.analysis.curves import save_loss, save_loss_by_position
from lightsparse.utils.text import count_text

ROWS = [
    {"step": 0, "tokens": 0, "val_bits_per_byte": 8.0},
    {"step": 10, "tokens": 1000, "train_bits_per_byte": 5.0},
    {"step": 20, "tokens": 2000, "train_bits_per_byte": 4.0, "val_bits_per_byte": 4.2},
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2], []], ids=["both", "validation", "training", "nothing"])
def test_loss_is_drawn_from_whatever_rows_there_are(rows: list[dict[str, float]], tmp_path: Path) -> None:
    picture = matplotlib.image.imread(save_loss(rows, tmp_path / "plots" / "loss.png", "run"))
    assert picture.shape[:2] == (800, 1280)
    coloured = (picture[..., 2] - picture[..., 0] > 0.1).mean()  # only the curves are blue
    assert (coloured > 0.0001) == bool(rows)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_loss_by_position_is_drawn_for_any_number_of_buckets(count: int, tmp_path: Path) -> None:
    buckets = [(0 if i == 0 else 8 << i, 16 << i, 3.0 - 0.1 * i) for i in range(count)]
    picture = matplotlib.image.imread(save_loss_by_position(buckets, tmp_path / "position.png", "run"))
    assert ((picture[..., 2] - picture[..., 0] > 0.1).mean() > 0.0001) == bool(count)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1500, "1.5k"), (2_000_000, "2M"), (3.5e9, "3.5B"), (1e12, "1T")]
)
def test_counts_read_as_on_an_axis(count: float, text: str) -> None:
    assert count_text(count) == text
