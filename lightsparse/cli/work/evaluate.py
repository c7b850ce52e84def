"""What `lightsparse evaluate` measures, and the tables it prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from lightsparse.cli.work.evaluate_sweep import save_side_by_side, shown, side_by_side
from lightsparse.config.eval_plan import EvalPlan
from lightsparse.config.targets import ConfigError
from lightsparse.data.source import DataConfig, SampleSet
from lightsparse.data.tokenizer import HuggingFace
from lightsparse.evaluation.run import Evaluation, drawn_column
from lightsparse.evaluation.subject import HuggingFaceModel, OwnModel
from lightsparse.sweep.record import load_record
from lightsparse.training.checkpoints.load_run import TrainedRun, load_run
from lightsparse.training.lightning_warnings import quiet_lightning
from lightsparse.utils.atomic_files import writable
from lightsparse.utils.text import first_line


def evaluate_run(
    folder: str,
    plan: EvalPlan,
    *,
    step: int | None,
    out: str | None,
    positions: bool,
    context: int | None,
    distances: bool,
    reach: int | None,
) -> Iterator[RenderableType]:
    """What is printed about a run directory, and goes into files, too; by the words of `lightsparse evaluate`."""
    quiet_lightning()
    where = writable(Path(out or Path(folder) / "evaluation"))
    run = load_run(folder, step)
    about = {"name": run.config.name, "step": run.step, "attention": run.config.attention.name}
    data = run.config.data.with_tokenizer(run.tokenizer)
    evaluation = Evaluation(OwnModel(run.model), run.tokenizer, data, where, about)
    yield from _tasks(evaluation, plan)
    if positions:
        with _as_config_error():
            rows = evaluation.positions(_validation(data, run, context), context)
        yield _table("loss by position", rows)
    if distances:
        if not data.has_answers:
            raise ConfigError("distances is true, but the run was not trained on a task; use tasks=[…]")
        rows = evaluation.distances(_validation(data, run), reach)
        yield _table("answers by distance to the evidence", rows)
    yield f"written to {where}"


def evaluate_model(name: str, plan: EvalPlan, out: str) -> Iterator[RenderableType]:
    """The same for a model of transformers, a folder or a name on the hub."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError("model=… needs transformers, which is not installed; pip install transformers") from error
    where = writable(Path(out))
    tokenizer = HuggingFace(path=name).build(lambda characters: iter(()))
    try:
        model = AutoModelForCausalLM.from_pretrained(name)
    except Exception as error:  # from whatever reads its files
        raise ConfigError(f"model is {name}, which cannot be loaded: {first_line(error)}") from error
    yield from _tasks(Evaluation(HuggingFaceModel(model), tokenizer, None, where, {"name": name}), plan)
    yield f"written to {out}"


def evaluate_sweep(folder: str, plan: EvalPlan, *, out: str | None, reach: int | None) -> Iterator[RenderableType]:
    """The same for every run of a sweep, a row each."""
    quiet_lightning()
    where = writable(Path(out or folder))
    record = load_record(Path(folder))
    if record is None:
        raise ConfigError(
            f"sweep is {folder}, where there is no sweep.json; name the folder that train.py -m has written"
        )
    with _as_config_error():
        rows = side_by_side(record, plan.lengths, plan.examples, plan.seed, reach)
    table = Table(title="right answers by length, and by distance at the length of the training", title_justify="left")
    table.box, table.pad_edge = None, False
    for index, heading in enumerate(shown(rows)[0]):
        names = None if index else max(len(row["run"]) for row in rows)  # whole, however narrow the terminal
        table.add_column(heading, justify="right" if index else "left", min_width=names)
    for cells in shown(rows)[1:]:
        table.add_row(*cells)
    yield table
    where.mkdir(parents=True, exist_ok=True)
    yield f"written to {', '.join(map(str, save_side_by_side(rows, where)))}"


@contextmanager
def _as_config_error() -> Iterator[None]:
    """For a length that the task, the data or the model cannot have: its own sentence."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _tasks(evaluation: Evaluation, plan: EvalPlan) -> list[Table]:
    with _as_config_error():
        found = evaluation.tasks(plan)
    return [_grid(name, rows) for name, rows in found.items()]


def _validation(data: DataConfig, run: TrainedRun, context: int | None = None) -> SampleSet:
    """The run's validation samples, or the same text in samples of another context. Raises ValueError for a bad one."""
    tokens = run.config.eval.tokens
    if context is not None:
        data = replace(data, context=context)
        if context > tokens:
            raise ValueError(f"context is {context}, more than the run's validation text (eval.tokens={tokens})")
    return data.samples(run.config.seed, tokens).val


def _grid(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Depth down, length across, as the heat map."""
    value = drawn_column(rows)
    lengths, depths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("length", "depth"))
    table = Table(title=f"{name}: {value.replace('_', ' ')}", title_justify="left", box=None, pad_edge=False)
    table.add_column("depth")
    for length in lengths:
        table.add_column(f"{length}", justify="right")
    cells = {(row["depth"], row["length"]): row[value] for row in rows}
    for depth in depths:
        shares = (f"{cells[depth, length]:.3f}" for length in lengths)
        table.add_row("all" if depth is None else f"{depth:.0%}", *shares)
    return table


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("tokens")
    for name in list(rows[0])[2:]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        shown = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in list(row.values())[2:])
        table.add_row(f"{row['start']} … {row['end'] - 1}", *shown)
    return table
