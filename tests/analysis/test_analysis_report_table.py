"""The table of a report: groups of runs that differ in their seed only, the best first, with sample deviations."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightsparse.analysis.report_table import Run, Spread, groups


def run(attention: str, seed: int, quality: float) -> Run:
    summary = {"attention": attention, "seed": seed, "sweep_metric": quality}
    return Run(Path(f"{attention}-{seed}"), {"attention.block": attention, "seed": seed}, summary, [])


def test_runs_of_several_seeds_are_one_group_and_the_best_group_comes_first() -> None:
    found = groups([run("b", 2, 3.0), run("a", 1, 1.0), run("b", 1, 2.0), run("a", 2, 1.5)])
    assert [[each.path.name for each in group.runs] for group in found] == [["a-1", "a-2"], ["b-1", "b-2"]]
    assert found[0].spread("sweep_metric").mean == 1.25


def test_the_deviation_is_that_of_a_sample() -> None:
    assert Spread.of([1.0, 3.0]).deviation == pytest.approx(2**0.5)
    assert (Spread.of([1.0]).deviation, Spread.of([]).mean) == (None, None)
