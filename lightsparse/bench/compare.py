"""Two result files side by side: rows under the same settings, a ratio per measured number, and what else differs."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lightsparse.bench.report import RESULTS, SETTINGS, Report, Row, cell, load

# Of the columns of results those that say which row it is. A density is a float that rounding may move.
NAMING = ("model", "saving", "seq", "work", "tokens")
ROUNDED = "density"
YARDSTICK = "dense_kernel"  # says what dense_ms is; rows of ours are the same beside another one

Key = tuple[tuple[str, str], ...]


def show(first: Path, second: Path, console: Console) -> None:
    """Print every number that both files measured under the same settings.

    Raises ValueError where they hold different measurements or share no row, FileNotFoundError without a file.
    """
    a, b = load(first), load(second)
    if a.kind != b.kind:
        raise ValueError(f"{first} holds `bench {a.kind}` and {second} `bench {b.kind}`; give two of the same command")
    names = [name for name in (*SETTINGS[a.kind], *NAMING, ROUNDED) if _is_in(name, a) and _is_in(name, b)]
    names = [name for name in names if name != YARDSTICK]
    of_a, of_b = _by_key(a, names), _by_key(b, names)
    shared = [key for key in of_a if key in of_b]
    if not shared:
        differ = [name for name in names if not {dict(k)[name] for k in of_a} & {dict(k)[name] for k in of_b}]
        raise ValueError(
            f"{first} and {second} share no row: they differ in {', '.join(differ) or 'the combination of settings'}; "
            "measure both with the same options"
        )
    for line in differences(a, b):
        console.print(line, markup=False, highlight=False)
    _print_table(a, b, shared, of_a, of_b, console)
    for path, own, other in ((first, of_a, of_b), (second, of_b, of_a)):
        alone = sum(key not in other for key in own)
        if alone:
            console.print(f"{alone} of {len(own)} rows are in {path} only.", markup=False, highlight=False)


def differences(a: Report, b: Report) -> list[str]:
    """A line per fact of machine, versions, command and yardstick in which the two differ."""
    facts = [{**report.hardware, **report.versions, "command": report.command} for report in (a, b)]
    if _is_in(YARDSTICK, a) and _is_in(YARDSTICK, b):
        for of, report in zip(facts, (a, b), strict=True):
            of[YARDSTICK] = ", ".join(sorted({str(row[YARDSTICK]) for row in report.rows}))
    return [
        f"{name}: {facts[0].get(name)} | {facts[1].get(name)}"
        for name in dict.fromkeys((*facts[0], *facts[1]))
        if facts[0].get(name) != facts[1].get(name)
    ]


def measured(kind: str) -> tuple[str, ...]:
    """The columns of a kind of report that are measurements."""
    return tuple(name for name in RESULTS[kind] if name not in (*NAMING, ROUNDED))


def _print_table(
    a: Report, b: Report, shared: list[Key], of_a: dict[Key, Row], of_b: dict[Key, Row], console: Console
) -> None:
    varied = [name for name in dict(shared[0]) if len({dict(key)[name] for key in shared}) > 1]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in varied:
        table.add_column(name)
    table.add_column("measured")
    for name in ("A", "B", "B / A"):
        table.add_column(name, justify="right")
    for key in shared:
        for name in measured(a.kind):
            left, right = of_a[key].get(name), of_b[key].get(name)
            if not isinstance(left, int | float) or not isinstance(right, int | float):
                continue
            ratio = f"{right / left:.3f}" if left else "–"
            table.add_row(*(dict(key)[column] for column in varied), name, cell(left), cell(right), ratio)
        table.add_section()
    console.print(table)


def _is_in(name: str, report: Report) -> bool:
    return any(name in row for row in report.rows)


def _by_key(report: Report, names: list[str]) -> dict[Key, Row]:
    """Rows by their settings; of several under the same ones the last."""
    return {tuple((name, _text(name, row.get(name))) for name in names): row for row in report.rows}


def _text(name: str, value: object) -> str:
    return f"{value:.2g}" if name == ROUNDED and isinstance(value, float) else cell(value)
