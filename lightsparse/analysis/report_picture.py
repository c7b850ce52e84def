"""What quality costs: bits per byte of each group of runs against density, speed and memory, with the Pareto front."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightsparse.analysis.report_table import METRICS, QUALITY, Group, front, quality_name

AGAINST = ("attention_density", "tokens_per_s", "peak_memory_mib")
COLOURS = ("#29337a", "#c4571b", "#1d7a5f", "#8a3fa0", "#b08a00", "#2a8fc4", "#b02a4c", "#6b6e80")  # one per group
_SOFT = "#b8bac6"


def save(found: Sequence[Group], path: Path) -> Path:
    """The three panels in one PNG; returns its path."""
    figure = Figure(figsize=(6.4, 11.0), dpi=150, layout="constrained")
    for place, metric in enumerate(AGAINST):
        _draw(figure.add_subplot(len(AGAINST), 1, place + 1), found, metric)
    figure.savefig(path)
    return path


def panels(found: Sequence[Group]) -> dict[str, bytes]:
    """Heading of the metric → its panel alone, as PNG."""
    pictures = {}
    for metric in AGAINST:
        figure = Figure(figsize=(5.2, 3.9), dpi=150, layout="constrained")
        _draw(figure.add_subplot(), found, metric)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        pictures[_heading(metric)[0]] = file.getvalue()
    return pictures


def _draw(axes: Axes, found: Sequence[Group], metric: str) -> None:
    heading, better = _heading(metric)
    points = []
    for place, group in enumerate(found):
        x, y = group.spread(metric), group.spread(QUALITY)
        if x.mean is None or y.mean is None:
            continue
        points.append((x.mean, y.mean))
        axes.errorbar(
            *points[-1],
            xerr=x.deviation,
            yerr=y.deviation,
            fmt="o",
            ms=6,
            color=COLOURS[place % len(COLOURS)],
            elinewidth=1,
            label=group.label if len(group.label) <= 44 else f"{group.label[:43]}…",
        )
    best = [points[i] for i in front(points, better)]
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=_SOFT, linewidth=1.2, zorder=0)
    axes.set_xlabel(f"{heading} ({'more' if better > 0 else 'less'} is better)")
    axes.set_ylabel(f"validation: {quality_name(found)}")
    axes.grid(color=_SOFT, alpha=0.35, linewidth=0.6)
    axes.margins(0.1, 0.15)
    axes.tick_params(labelsize=10, length=3, color=_SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    if 1 < len(points) <= len(COLOURS):
        axes.legend(frameon=False, fontsize=8.5)


def _heading(metric: str) -> tuple[str, int]:
    return next((heading, better) for name, heading, better in METRICS if name == metric)
