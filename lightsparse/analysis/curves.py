"""The curves of a run: loss and accuracy against tokens read, and loss against position in the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightsparse.utils.text import count_text

Unit = Literal["bits_per_byte", "loss"]  # of losses, as metrics.csv names them
_UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}
_TRAIN, _VALIDATION = "#9aa3c7", "#29337a"  # pale and dark blue, told apart in grey too
_SOFT = "#b8bac6"  # spines and grid
_BITS_TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16)


def save_loss(rows: Sequence[Mapping[str, float]], path: Path, title: str, unit: Unit = "bits_per_byte") -> Path:
    """Loss of training and validation against training tokens, to `path` (PNG); returns the path.

    rows  rows of metrics.csv: `tokens` with `train_<unit>`, `val_<unit>` or both
    """
    train, validation = (
        [(row["tokens"], row[f"{part}_{unit}"]) for row in rows if f"{part}_{unit}" in row] for part in ("train", "val")
    )
    axes = _axes(title)
    if train:
        axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=1.3, label="training")
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            color=_VALIDATION,
            linewidth=1.6,
            marker="o",
            ms=4.5,
            label="validation",
            clip_on=False,
            zorder=3,
        )
        _mark_last(axes, *validation[-1])
    axes.set_xlabel("training tokens")
    axes.set_ylabel(f"loss ({_UNITS[unit]})")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axes.set_xlim(0, 1.1 * max([1.0, *(tokens for tokens, _ in train + validation)]))  # room for the number
    _log_bits(axes, [value for _, value in train + validation])
    if train or validation:
        axes.legend(frameon=False, loc="upper right")
    return _saved(axes, path)


def save_accuracy(rows: Sequence[Mapping[str, float]], path: Path, title: str, goal: float | None = None) -> Path:
    """Share of right answers against training tokens, to `path` (PNG); returns the path.

    rows  rows of metrics.csv: `val_accuracy` and `val_exact_match` of those that have them
    goal  drawn as a line
    """
    axes = _axes(title)
    for name, label, style in (("val_accuracy", "answers", "-"), ("val_exact_match", "examples, all answers", ":")):
        points = [(row["tokens"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=_VALIDATION, linewidth=1.6, label=label)
    if goal is not None:
        axes.axhline(goal, color=_TRAIN, linewidth=1.0, dashes=(6, 3), label=f"goal {goal:g}")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("share right (validation)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="upper left")
    return _saved(axes, path)


def save_loss_by_position(
    buckets: Sequence[tuple[int, int, float]], path: Path, title: str, unit: Unit = "bits_per_byte"
) -> Path:
    """Validation loss against the position of the token in its context, to `path` (PNG); returns the path.

    buckets  (first position, end position, loss) of each bucket, in order
    """
    axes = _axes(title)
    centres = [(max(start, end / 4) * end) ** 0.5 for start, end, _ in buckets]  # of the bucket, on a log axis
    values = [value for _, _, value in buckets]
    axes.plot(centres, values, color=_VALIDATION, linewidth=1.6, marker="o", ms=4.5)
    if buckets:
        _mark_last(axes, centres[-1], values[-1])
        axes.set_xscale("log", base=2)
        edges = [end for _, end, _ in buckets]
        axes.set_xlim(edges[0] / 2.5, edges[-1] * 1.6)
        axes.xaxis.set_major_locator(FixedLocator(edges))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _binary(value)))
    axes.set_xlabel("tokens of context before the predicted one")
    axes.set_ylabel(f"validation loss ({_UNITS[unit]})")
    axes.margins(y=0.15)
    return _saved(axes, path)


def _axes(title: str) -> Axes:
    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color=_SOFT, alpha=0.35, linewidth=0.6)
    axes.tick_params(labelsize=10, length=3, color=_SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    return axes


def _log_bits(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis, because the first thousand tokens would otherwise take all the room; plain numbers on it."""
    if not values:
        return
    low, high = min(values), max(values)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.12, high * 1.08)
    axes.yaxis.set_major_locator(FixedLocator(_BITS_TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark_last(axes: Axes, x: float, y: float) -> None:
    axes.annotate(
        f"{y:.3f}", (x, y), xytext=(7, 0), textcoords="offset points", va="center", color=_VALIDATION, fontsize=10
    )


def _binary(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _saved(axes: Axes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.savefig(path)
    return path
