"""Results as files: rows as JSON and CSV, a grid of length × depth as a heat map."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightsparse.utils.atomic_files import write_text

_COLOURS = "cividis"  # told apart in grey and by the colour-blind


def save_rows(rows: Sequence[Mapping[str, Any]], path: Path, about: Mapping[str, Any]) -> list[Path]:
    """`path`.json with `about` and the rows, `path`.csv with the rows; returns both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = [path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.csv")]
    write_text(files[0], json.dumps({**about, "rows": list(rows)}, indent=2) + "\n")
    write_text(files[1], table.getvalue())
    return files


def save_heat_map(rows: Sequence[Mapping[str, Any]], value: str, path: Path, title: str) -> Path:
    """Share right over length (across) and depth (down), each cell with its number, to `path` (PNG).

    value  the column that is drawn, in [0, 1]
    """
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows}, key=lambda depth: -1.0 if depth is None else depth)
    cells = {(row["depth"], row["length"]): row[value] for row in rows}
    grid = [[cells[depth, length] for length in lengths] for depth in depths]
    figure = Figure(
        figsize=(1.9 + 0.75 * max(3, len(lengths)), 1.6 + 0.42 * len(depths)), dpi=200, layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap=_COLOURS, aspect="auto")
    for row, line in enumerate(grid):
        for column, share in enumerate(line):
            colour = "black" if share > 0.55 else "white"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(lengths)), [f"{n / 1024:g}k" if n >= 1024 else str(n) for n in lengths], fontsize=9)
    axes.set_yticks(range(len(depths)), ["all" if depth is None else f"{depth:.0%}" for depth in depths], fontsize=9)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("depth of the evidence")
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=value.replace("_", " "), shrink=0.9).outline.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
