"""metrics.csv loses nothing, repeats nothing, and is a plain CSV to everyone else."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightsparse.training.metrics.metrics_file import COLUMNS, MetricsFile, read_metrics


def written(path: Path, steps: range) -> MetricsFile:
    metrics = MetricsFile(path)
    for step in steps:
        metrics.log_metrics({"tokens": step * 100, "train_loss": 5.0 / (step + 1)}, step=step)
    return metrics


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    metrics = written(tmp_path / "metrics.csv", range(1))
    assert len(read_metrics(metrics.path)) == 1
    metrics.log_metrics({"val_loss": 3.25}, step=7)
    assert read_metrics(metrics.path)[1] == {"step": 7, "val_loss": 3.25}


def test_the_header_is_fixed_and_rows_have_its_width(tmp_path: Path) -> None:
    written(tmp_path / "metrics.csv", range(3))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert all(len(row) == len(COLUMNS) for row in rows)


def test_losses_keep_eight_digits_and_counts_all_of_theirs(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.log_metrics({"tokens": 123_456_789_012, "train_loss": 1.23456789}, step=1)
    (row,) = read_metrics(metrics.path)
    assert row["tokens"] == 123_456_789_012
    assert row["train_loss"] == pytest.approx(1.23456789, rel=1e-7)


def test_rewinding_keeps_earlier_rows_as_they_are_and_drops_later_and_half_ones(tmp_path: Path) -> None:
    metrics = written(tmp_path / "metrics.csv", range(10))
    before = metrics.path.read_text().splitlines()
    with metrics.path.open("a") as file:
        file.write("10,1000,3")  # killed in the middle of a row
    metrics.rewind(6)
    assert metrics.path.read_text().splitlines() == before[:8]
    metrics.log_metrics({"train_loss": 0.5}, step=7)
    assert [row["step"] for row in read_metrics(metrics.path)] == list(range(8))


def test_rewinding_before_the_first_row_leaves_the_header_once(tmp_path: Path) -> None:
    metrics = written(tmp_path / "metrics.csv", range(3))
    metrics.rewind(-1)
    metrics.log_metrics({"train_loss": 0.5}, step=1)
    assert metrics.path.read_text().count("train_loss") == 1
    assert len(read_metrics(metrics.path)) == 1


def test_metrics_of_other_names_make_no_row(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.log_metrics({"lr-AdamW": 0.1}, step=3)
    assert read_metrics(metrics.path) == []


def test_a_step_has_one_row_and_the_later_call_has_it(tmp_path: Path) -> None:
    metrics = written(tmp_path / "metrics.csv", range(3))
    metrics.log_metrics({"tokens": 200, "train_loss": 2.5, "val_loss": 3.25}, step=2)
    assert [row["step"] for row in read_metrics(metrics.path)] == [0, 1, 2]
    assert read_metrics(metrics.path)[2] == {"step": 2, "tokens": 200, "train_loss": 2.5, "val_loss": 3.25}
    metrics.log_metrics({"tokens": 300}, step=3)
    assert len(read_metrics(metrics.path)) == 4
