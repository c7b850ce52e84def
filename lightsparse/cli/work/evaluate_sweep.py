"""The runs of a sweep on the task that they were trained on: right answers by length and by distance, a row per run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightsparse.config.targets import ConfigError
from lightsparse.data.tasks.task import VAL, TaskConfig, TaskSamples
from lightsparse.evaluation.distance import batches, by_distance
from lightsparse.evaluation.subject import OwnModel
from lightsparse.evaluation.tasks import OWN, check_fit
from lightsparse.models.transformer import context_for
from lightsparse.sweep.record import SweepRecord
from lightsparse.training.checkpoints.load_run import TrainedRun, load_run
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.utils.atomic_files import write_text

Row = dict[str, Any]


def side_by_side(sweep: SweepRecord, lengths: Sequence[int], examples: int, seed: int, reach: int | None) -> list[Row]:
    """One row per finished trial, in the order of the sweep.

    lengths   tokens of context; () = that of each training
    examples  of validation per length, drawn under `seed`
    reach     a distance that the buckets are cut at besides
    Columns: run, density (of the chosen attention, at the length of the training), steps, tokens_per_s of the training,
    accuracy_<length>, and at the length of the training accuracy_<first>_to_<last> for distances.
    Raises ConfigError where no trial has finished, or one was trained on no task.
    """
    rows: list[Row] = []
    for trial in sweep.with_status("finished"):
        # Runs lie beside their sweep, wherever both have been moved.
        beside = sweep.directory.parent / Path(trial.run).name
        folder = beside if beside.exists() else Path(trial.run)
        name = " ".join(word.partition("=")[2] for word in trial.varied) or folder.name
        if not RunDirectory(folder).summary.is_file():
            raise ConfigError(f"sweep has {folder}, which is not there any more; give the same train.py -m again")
        summary = json.loads(RunDirectory(folder).summary.read_text(encoding="utf-8"))
        rows.append(
            {"run": name, "density": None, "steps": summary["steps"], "tokens_per_s": summary["tokens_per_s"]}
            | _answers(load_run(folder), folder, lengths, examples, seed, reach)
        )
    if not rows:
        raise ConfigError(f"sweep is {sweep.directory}, of which no trial has finished; train it first")
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _answers(run: TrainedRun, folder: Path, lengths: Sequence[int], examples: int, seed: int, reach: int | None) -> Row:
    task, subject = run.config.data, OwnModel(run.model)
    if not isinstance(task, TaskConfig):
        raise ConfigError(f"sweep has {folder}, which was not trained on a task; use run={folder} tasks=[…]")
    check_fit(task, OWN, lengths or (task.context,), subject)
    found: Row = {}
    distances: Row = {}
    for length in dict.fromkeys((*lengths, task.context)):
        samples = TaskSamples(replace(task, context=length), seed, VAL, examples)
        buckets = by_distance(subject, samples, reach)
        if length in lengths or not lengths:
            right = sum(bucket["accuracy"] * bucket["answers"] for bucket in buckets)
            found[f"accuracy_{length}"] = right / sum(bucket["answers"] for bucket in buckets)
        if length == task.context:
            found["density"] = _chosen_density(run, samples)
            distances = {f"accuracy_{row['start']}_to_{row['end'] - 1}": row["accuracy"] for row in buckets}
    return found | distances


def _chosen_density(run: TrainedRun, samples: TaskSamples) -> float | None:
    """Of the layers with the chosen attention, on the first batch; None where there are none."""
    tokens_BN = batches(samples)[0]["tokens"]
    with torch.no_grad():
        stats = run.model(tokens_BN, context_for(tokens_BN)).stats
    return float(stats["chosen_density"]) if "chosen_density" in stats else None


def save_side_by_side(rows: Sequence[Row], folder: Path) -> list[Path]:
    """answers.csv, and answers.md with the same numbers as one reads them; returns both."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    lines = [shown(rows)[0], ["---", *("---:" for _ in list(rows[0])[1:])], *shown(rows)[1:]]
    files = [folder / "answers.csv", folder / "answers.md"]
    write_text(files[0], text.getvalue())
    write_text(files[1], "".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    return files


def shown(rows: Sequence[Row]) -> list[list[str]]:
    """Headings and cells as one reads them."""
    headings = [name.removeprefix("accuracy_").replace("_to_", "–").replace("_", " ") for name in rows[0]]
    return [headings, *([_cell(name, value) for name, value in row.items()] for row in rows)]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if name == "tokens_per_s" else f"{value:.3f}"
    return str(value)
