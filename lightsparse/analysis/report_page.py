"""The report as one HTML file that opens without a network: numbers, pictures, curves and script all inside.

Everything that comes from a run is escaped, and the page's own policy allows no address but its own data.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from lightsparse.analysis.report_picture import COLOURS, panels
from lightsparse.analysis.report_table import QUALITY, Group, differing, front, measured, number, quality_name

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_CURVES = (
    *("val_bits_per_byte", "val_accuracy", "val_loss", "train_bits_per_byte", "train_loss"),
    *("tokens_per_s", "grad_norm", "learning_rate"),
)
_AXES = ("tokens", "step", "wall_s")


def page(title: str, found: Sequence[Group], remarks: Sequence[str] = ()) -> str:
    """The whole file.

    remarks  sentences above the table: trials that failed, runs without an end
    """
    folder = Path(__file__).parent
    style, script = ((folder / f"report.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    runs = sum(len(group.runs) for group in found)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{runs} runs in {len(found)} groups; mean ± standard deviation over seeds. "
        "A tap on a heading sorts; ● marks groups that no other one beats in density and "
        f"{escape(quality_name(found))}.</p>",
        *(f'<p class="remark">{escape(remark)}</p>' for remark in remarks),
        _group_table(found),
        "<h2>What quality costs</h2>",
        '<div class="pictures">',
        *(_image(png, f"{quality_name(found)} against {against}") for against, png in panels(found).items()),
        "</div>",
        "<h2>Curves</h2>",
        _curve_controls(found),
        "<h2>What is attended</h2>",
        _patterns(found),
        "<h2>Configs</h2>",
        _configs(found),
        "<h2>Runs</h2>",
        _run_table(found),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>\n{style}</style></head><body>",
            *body,
            f'<script type="application/json" id="curves">{_json(_curve_data(found))}</script>',
            f"<script>\n{script}</script></body></html>\n",
        ]
    )


def _group_table(found: Sequence[Group]) -> str:
    keys = list(dict.fromkeys(key for group in found for key in group.values))
    points = [(group.spread("attention_density").mean, group.spread(QUALITY).mean) for group in found]
    whole = [(i, (x, y)) for i, (x, y) in enumerate(points) if x is not None and y is not None]
    best = {whole[i][0] for i in front([point for _, point in whole], -1)}
    rows = []
    for place, group in enumerate(found):
        cells = [_cell("●" if place in best else "", 0 if place in best else 1, colour=COLOURS[place % len(COLOURS)])]
        cells += [_cell(group.values.get(key, "–"), group.values.get(key, "")) for key in keys]
        cells += [_cell(str(len(group.runs)), len(group.runs))]
        spreads = [group.spread(name) for name, _, _ in measured(found)]
        cells += [_cell(str(spread), "" if spread.mean is None else spread.mean) for spread in spreads]
        rows.append(cells)
    return _table(["", *keys, "runs", *(heading for _, heading, _ in measured(found))], rows, 1 + len(keys))


def _run_table(found: Sequence[Group]) -> str:
    rows = []
    for group in found:
        for run in group.runs:
            values = [run.summary.get(name) for name, _, _ in measured(found)]
            cells = [_cell(run.path.name, run.path.name), _cell(group.label, group.label)]
            cells += [_cell(str(run.summary["seed"]), run.summary["seed"])]
            cells += [
                _cell("–" if value is None else number(value), "" if value is None else value) for value in values
            ]
            rows.append(cells)
    return _table(["run", "group", "seed", *(heading for _, heading, _ in measured(found))], rows, 2)


def _configs(found: Sequence[Group]) -> str:
    """The keys that differ, a column per group; what all share below, folded."""
    runs = [run for group in found for run in group.runs]
    keys = differing(runs)
    rows = [[_cell(key, key), *(_cell(str(group.runs[0].config.get(key, "–")), "") for group in found)] for key in keys]
    shared = {key: value for key, value in runs[0].config.items() if key not in keys and key not in ("name", "seed")}
    lines = "\n".join(f"{key}: {value}" for key, value in shared.items())
    table = _table(["key", *(group.label for group in found)], rows, 1 + len(found)) if keys else ""
    folded = f"<details><summary>What all runs share</summary><pre>{escape(lines)}</pre></details>"
    return f"{table}\n{folded}"


def _patterns(found: Sequence[Group]) -> str:
    """The pattern picture of one run of each group; variants that choose from their input have none."""
    figures = []
    for group in found:
        picture = group.runs[0].path / "plots" / "attention.png"
        if picture.exists():
            figures.append(_image(picture.read_bytes(), group.label))
    return '<div class="pictures">' + "\n".join(figures) + "</div>" if figures else "<p>No fixed pattern to draw.</p>"


def _curve_controls(found: Sequence[Group]) -> str:
    """Metrics that some run has, so that the first one shows something."""
    held = {key for group in found for run in group.runs for row in run.rows for key in row}
    curves = [one for one in _CURVES if one in held]

    def choice(name: str, label: str, options: Sequence[str]) -> str:
        words = "".join(f'<option value="{one}">{one.replace("_", " ")}</option>' for one in options)
        return f'<label>{label} <select id="{name}">{words}</select></label>'

    return (
        f'<p class="controls">{choice("metric", "show", curves)} {choice("axis", "over", _AXES)} '
        '<label><input type="checkbox" id="log"> logarithmic</label> <button id="whole">whole range</button></p>'
        '<canvas id="plot"></canvas><p id="under">Drag over a range to look closer.</p><ul id="legend"></ul>'
    )


def _curve_data(found: Sequence[Group]) -> list[dict[str, object]]:
    data: list[dict[str, object]] = []
    for place, group in enumerate(found):
        for run in group.runs:
            kept = [{key: row[key] for key in (*_AXES, *_CURVES) if key in row} for row in run.rows]
            data.append(
                {"run": run.path.name, "group": group.label, "colour": COLOURS[place % len(COLOURS)], "rows": kept}
            )
    return data


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """text_columns  so many columns at the left hold text, the others numbers."""
    head = "".join(
        f'<th class="{"text" if i < text_columns else "number"}"><button>{escape(heading) or "front"}</button></th>'
        for i, heading in enumerate(headings)
    )
    lines = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    columns = f'data-text="{text_columns}"'
    return f'<div class="wide"><table {columns}><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def _cell(text: str, key: object, colour: str = "") -> str:
    """key  what the column is sorted by."""
    style = f' style="border-left: 6px solid {colour}"' if colour else ""
    return f'<td data-key="{escape(str(key))}"{style}>{escape(text)}</td>'


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    words = escape(caption)
    return f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'


def _json(value: object) -> str:
    """JSON that cannot close the element it stands in."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def remark_lines(failed: Mapping[str, str], unfinished: Sequence[Path]) -> list[str]:
    """failed: title of a trial → what it ended with; unfinished: runs without summary.json."""
    lines = [f"Failed: {title}: {error}" for title, error in failed.items()]
    if unfinished:
        lines.append(f"Not finished and left out: {', '.join(str(path) for path in unfinished)}")
    return lines
