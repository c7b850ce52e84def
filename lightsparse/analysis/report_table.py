"""Runs side by side: grouped by everything but the seed that differs, with mean and deviation over seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of summary.json: name, heading, which way is better (+1 up, −1 down, 0 neither).
METRICS = (
    ("val_bits_per_byte", "bits per byte", -1),
    ("val_accuracy", "accuracy", 1),
    ("attention_density", "achieved density", -1),
    ("tokens_per_s", "tokens/s", 1),
    ("peak_memory_mib", "peak MiB", -1),
    ("train_s", "training, s", -1),
    ("parameters", "parameters", 0),
    ("steps", "steps", 0),
)
QUALITY = "sweep_metric"  # what the run minimises: bits per byte, or the share of wrong answers
# Where a run lies and how it was watched makes no group; the seed is what groups are means over.
_NO_GROUP = ("name", "runs_dir", "resume", "seed", "allow_targets", "trainer.progress", "trainer.log_every_n_steps")


@dataclass(frozen=True)
class Run:
    path: Path
    config: dict[str, Any]  # of config.yaml, dotted key → value
    summary: dict[str, Any]
    rows: list[dict[str, float]]  # of metrics.csv


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; None where there is no number, or only one."""

    mean: float | None
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(None, None)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        if not self.deviation:
            return number(self.mean)
        # Two digits of the deviation, and the mean down to the same place: 7.757 ± 0.040.
        places = 1 - math.floor(math.log10(float(f"{self.deviation:.1e}")))
        if places > 6:
            return f"{number(self.mean)} ± {self.deviation:.1e}"
        return " ± ".join(f"{round(value, places):,.{max(places, 0)}f}" for value in (self.mean, self.deviation))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    values: dict[str, str]  # short name of a key that differs between groups → its value here
    runs: list[Run]

    @property
    def label(self) -> str:
        return " · ".join(f"{key} {value}" for key, value in self.values.items()) or self.runs[0].summary["attention"]

    def spread(self, metric: str) -> Spread:
        return Spread.of([run.summary[metric] for run in self.runs if run.summary.get(metric) is not None])


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys that make groups: those for which the runs that have them give several values, in the config's order."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    several = [key for key in keys if len({str(run.config[key]) for run in runs if key in run.config}) > 1]
    return [key for key in several if key not in _NO_GROUP]


def groups(runs: Sequence[Run]) -> list[Group]:
    """The groups, best quality first."""
    keys = differing(runs)
    names = _short(keys)
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.summary["seed"]):
        found.setdefault(tuple(_value(key, run.config) for key in keys), []).append(run)
    made = [
        Group({names[key]: value for key, value in zip(keys, values, strict=True) if value}, members)
        for values, members in found.items()
    ]

    def quality(group: Group) -> float:
        mean = group.spread(QUALITY).mean
        return math.inf if mean is None else mean

    return sorted(made, key=quality)


def front(points: Sequence[tuple[float, float]], better: int) -> list[int]:
    """Indices of the points that no other one beats in both: quality (second, smaller is better) and the first.

    better  +1 when a larger first number is better, −1 when a smaller one is
    Ordered by the first number.
    """
    keep = [
        i
        for i, (x, y) in enumerate(points)
        if not any((x2 - x) * better >= 0 and y2 <= y and (x2, y2) != (x, y) for x2, y2 in points)
    ]
    return sorted(keep, key=lambda i: points[i])


def measured(found: Sequence[Group]) -> list[tuple[str, str, int]]:
    """The METRICS that some group has."""
    return [metric for metric in METRICS if any(group.spread(metric[0]).mean is not None for group in found)]


def quality_name(found: Sequence[Group]) -> str:
    """What QUALITY is here."""
    names = {run.summary.get("minimised", "val_bits_per_byte") for group in found for run in group.runs}
    return " or ".join(sorted(name.replace("val_", "").replace("_", " ") for name in names))


def csv_text(found: Sequence[Group]) -> str:
    """A row per group: its values, the number of runs, mean and deviation of every metric."""
    keys = list(dict.fromkeys(key for group in found for key in group.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "runs", "seeds", *(f"{name}{end}" for name, _, _ in METRICS for end in ("", "_std"))])
    for group in found:
        spreads = [group.spread(name) for name, _, _ in METRICS]
        numbers = [value for spread in spreads for value in (spread.mean, spread.deviation)]
        seeds = " ".join(str(run.summary["seed"]) for run in group.runs)
        writer.writerow([*(group.values.get(key, "") for key in keys), len(group.runs), seeds, *numbers])
    return text.getvalue()


def number(value: float) -> str:
    """As people read it: four significant digits, thousands apart."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _short(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key where that is unique; `attention._target_` is the attention."""
    plain = {key: key.removesuffix("._target_") for key in keys}
    last = {key: plain[key].rsplit(".", 1)[-1] for key in keys}
    return {key: last[key] if list(last.values()).count(last[key]) == 1 else plain[key] for key in keys}


def _value(key: str, config: Mapping[str, Any]) -> str:
    if key not in config:
        return ""
    value = str(config[key])
    return value.rsplit(".", 1)[-1] if key.endswith("_target_") else value
