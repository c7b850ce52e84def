"""What `lightsparse report` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from lightsparse.analysis import report_picture
from lightsparse.analysis.report_page import page, remark_lines
from lightsparse.analysis.report_table import METRICS, QUALITY, Group, Run, csv_text, flat, groups, measured
from lightsparse.config.targets import ConfigError
from lightsparse.sweep.record import SweepRecord, load_record
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.metrics.summary import sweep_metric
from lightsparse.utils.atomic_files import writable, write_text

_SHOWN = METRICS[:5]


def report(folders: Sequence[Path], out: Path | None = None) -> tuple[list[Group], list[str], list[Path]]:
    """Write report.html, report.csv and report.png; returns the groups, what to remark, and the files.

    folders  one sweep directory or several run directories
    out      where to; None = into the sweep's directory, or where this is called
    Raises ConfigError for a folder that is neither, and where no run has finished.
    """
    failed: dict[str, str] = {}
    runs: list[Path] = []
    sweeps = 0
    for folder in folders:
        sweep = load_record(folder)
        if sweep is None:
            runs.append(folder)
        else:
            sweeps += 1
            runs += [_beside(sweep, trial.run) for trial in sweep.trials if trial.status != "failed"]
            failed |= {trial.title: trial.error or "no word" for trial in sweep.with_status("failed")}
    runs = list(dict.fromkeys(runs))
    for run in runs:
        if not RunDirectory(run).config.is_file() and not sweeps:
            raise ConfigError(f"{run} holds neither config.yaml nor sweep.json; name runs/<sweep>, or run directories")
    whole = [run for run in runs if RunDirectory(run).summary.is_file()]
    remarks = remark_lines(failed, [run for run in runs if run not in whole])
    if not whole:
        raise ConfigError(f"none of {', '.join(map(str, folders))} has a finished run; {'; '.join(remarks)}")
    out = writable(out or (folders[0] if sweeps else Path()))
    found = groups([_load(run) for run in whole])
    out.mkdir(parents=True, exist_ok=True)
    title = folders[0].resolve().name if len(folders) == 1 else f"{len(whole)} runs"
    write_text(out / "report.html", page(title, found, remarks))
    write_text(out / "report.csv", csv_text(found))
    report_picture.save(found, out / "report.png")
    return found, remarks, [out / f"report.{end}" for end in ("html", "csv", "png")]


def _beside(sweep: SweepRecord, run: str) -> Path:
    """Runs lie beside their sweep, wherever both have been moved or from where this is called."""
    beside = sweep.directory.parent / Path(run).name
    return beside if beside.exists() else Path(run)


def _load(path: Path) -> Run:
    directory = RunDirectory(path)
    summary = json.loads(directory.summary.read_text(encoding="utf-8"))
    summary[QUALITY] = sweep_metric(summary)
    return Run(path, flat(directory.stored), summary, read_metrics(directory.metrics))


def as_table(found: Sequence[Group]) -> Table:
    keys = list(dict.fromkeys(key for group in found for key in group.values))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for key in keys:
        table.add_column(key)
    table.add_column("runs", justify="right")
    shown = [metric for metric in measured(found) if metric in _SHOWN]
    for _, heading, _ in shown:
        table.add_column(heading, justify="right")
    for group in found:
        cells = [group.values.get(key, "–") for key in keys]
        table.add_row(*cells, str(len(group.runs)), *(str(group.spread(name)) for name, _, _ in shown))
    return table
