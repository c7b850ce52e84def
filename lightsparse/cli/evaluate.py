"""Evaluate a trained run, or a model of transformers, on tasks and by position; results as JSON, CSV and PNG.

  lightsparse evaluate run=runs/<name> tasks=[passkey,niah_single_1] lengths=[1024,4096]
  lightsparse evaluate run=runs/<name> positions=true context=8192
  lightsparse evaluate run=runs/<name> distances=true reach=128
  lightsparse evaluate sweep=runs/<sweep> lengths=[256,512,1024]
  lightsparse evaluate model=<folder or name on the hub> tasks=[passkey] lengths=[2048]

tasks=[…]        of conf/data/; own = the task the run was trained on
lengths=[…]      tokens of context (default: that of the training)
depths=[…]       shares of the text before what is asked (default 0, 0.25, 0.5, 0.75, 1)
examples=N       per length and depth (default 10); seed=N draws others
generate=false   leaves out generated text and each task's own metric on it: faster
positions=true   loss by position on the run's validation data;
                 context=N reads it in texts of N tokens, longer than those of the training, say
distances=true   accuracy by distance to the evidence, on the validation data of a run trained on a task;
                 reach=N cuts the distances there besides
step=N           of the checkpoint (default: the newest)
sweep=FOLDER     a row for each run of a sweep, on the task that it was trained on: right answers by length and distance
out=FOLDER       for the results (default: <run>/evaluation, or the sweep's own folder)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from lightsparse.cli.evaluate_sweep import save_side_by_side, shown, side_by_side
from lightsparse.config.eval_plan import EvalPlan
from lightsparse.config.targets import ConfigError
from lightsparse.config.typed import typed
from lightsparse.data import DataError
from lightsparse.data.source import SampleSet
from lightsparse.data.tokenizer import HuggingFace
from lightsparse.evaluation.run import Evaluation, drawn_column
from lightsparse.evaluation.subject import HuggingFaceModel, OwnModel
from lightsparse.sweep.record import load_record
from lightsparse.training.checkpoints.load_run import TrainedRun, load_run
from lightsparse.training.lightning_warnings import quiet_lightning


@dataclass(frozen=True, kw_only=True)
class Words(EvalPlan):
    """The command line."""

    run: str | None = None
    model: str | None = None
    sweep: str | None = None
    step: int | None = None
    out: str | None = None
    positions: bool = False
    context: int | None = None  # tokens per sample of positions; null = that of the training
    distances: bool = False
    reach: int | None = None  # tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(given is not None for given in (self.run, self.model, self.sweep)) != 1:
            raise ValueError(
                "name one model: run=<run directory> or model=<folder or name on the hub>; or runs: sweep=<folder>"
            )
        if self.sweep is not None:
            if self.tasks or self.positions or self.distances or self.context is not None or self.step is not None:
                raise ValueError("tasks, positions, context, distances and step belong to run=…, not to sweep=…")
            return
        if not (self.tasks or self.positions or self.distances):
            raise ValueError("nothing is asked for; add tasks=[…], positions=true or distances=true")
        if self.model is not None and (self.positions or self.distances or self.step is not None):
            raise ValueError("positions, distances and step belong to a run; model=… takes tasks=[…]")
        if self.model is not None and (self.out is None or not self.lengths):
            raise ValueError("model=… needs out=<folder> for the results and lengths=[…] in tokens")
        if self.context is not None and not self.positions:
            raise ValueError(f"context is {self.context}, which only positions=true reads; lengths=[…] is for tasks")
        if self.reach is not None and not self.distances:
            raise ValueError(f"reach is {self.reach}, which only distances=true reads")


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and print; returns the exit code: 0, or 2 after the one sentence that says what is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    if not given or {"-h", "--help"} & set(given):
        console.print(__doc__, markup=False, highlight=False)
        return 0
    quiet_lightning()
    try:
        evaluate(_words(given), console)
    except (ConfigError, DataError) as error:
        errors.print(str(error), markup=False, highlight=False)
        return 2
    return 0


def evaluate(words: Words, console: Console) -> None:
    """All that the command line asks for, printed and written."""
    if words.sweep is not None:
        _sweep(words.sweep, words, console)
        return
    run = None if words.run is None else load_run(words.run, words.step)
    evaluation = _of_model(words) if run is None else _of_run(run, words)
    plan = EvalPlan(**{field.name: getattr(words, field.name) for field in fields(EvalPlan)})
    try:
        for name, rows in evaluation.tasks(plan).items():
            console.print(_grid(name, rows))
        if words.positions:
            assert run is not None
            samples = _validation(evaluation, run, words.context)
            console.print(_table("loss by position", evaluation.positions(samples, words.context)))
    except ValueError as error:  # a length that the task, the data or the model cannot have: its own sentence
        raise ConfigError(str(error)) from error
    if words.distances:
        assert run is not None
        if evaluation.data is None or not evaluation.data.has_answers:
            raise ConfigError("distances is true, but the run was not trained on a task; use tasks=[…]")
        rows = evaluation.distances(_validation(evaluation, run), words.reach)
        console.print(_table("answers by distance to the evidence", rows))
    console.print(f"written to {evaluation.folder}", markup=False, highlight=False)


def _sweep(folder: str, words: Words, console: Console) -> None:
    record = load_record(Path(folder))
    if record is None:
        raise ConfigError(
            f"sweep is {folder}, where there is no sweep.json; name the folder that train.py -m has written"
        )
    try:
        rows = side_by_side(record, words.lengths, words.examples, words.seed, words.reach)
    except ValueError as error:  # a length that the task cannot have: the task's own sentence
        raise ConfigError(str(error)) from error
    table = Table(title="right answers by length, and by distance at the length of the training", title_justify="left")
    table.box, table.pad_edge = None, False
    for index, heading in enumerate(shown(rows)[0]):
        names = None if index else max(len(row["run"]) for row in rows)  # whole, however narrow the terminal
        table.add_column(heading, justify="right" if index else "left", min_width=names)
    for cells in shown(rows)[1:]:
        table.add_row(*cells)
    console.print(table)
    out = Path(words.out or folder)
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"written to {', '.join(map(str, save_side_by_side(rows, out)))}", markup=False, highlight=False)


def _of_run(run: TrainedRun, words: Words) -> Evaluation:
    assert words.run is not None
    folder = Path(words.out or Path(words.run) / "evaluation")
    about = {"name": run.config.name, "step": run.step, "attention": run.config.attention.name}
    data = run.config.data.with_tokenizer(run.tokenizer)
    return Evaluation(OwnModel(run.model), run.tokenizer, data, folder, about)


def _validation(evaluation: Evaluation, run: TrainedRun, context: int | None = None) -> SampleSet:
    """The run's validation samples, or the same text in samples of another context. Raises ValueError for a bad one."""
    data, tokens = evaluation.data, run.config.eval.tokens
    assert data is not None
    if context is not None:
        data = replace(data, context=context)
        if context > tokens:
            raise ValueError(f"context is {context}, more than the run's validation text (eval.tokens={tokens})")
    return data.samples(run.config.seed, tokens).val


def _of_model(words: Words) -> Evaluation:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError("model=… needs transformers, which is not installed; pip install transformers") from error
    assert words.model is not None and words.out is not None
    tokenizer = HuggingFace(path=words.model).build(lambda characters: iter(()))
    try:
        model = AutoModelForCausalLM.from_pretrained(words.model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model is {words.model}, which cannot be loaded: {str(error).splitlines()[0]}") from error
    return Evaluation(HuggingFaceModel(model), tokenizer, None, Path(words.out), {"name": words.model})


def _words(given: Sequence[str]) -> Words:
    unknown = [word for word in given if "=" not in word]
    if unknown:
        raise ConfigError(f"{unknown[0]} is no key=value; lightsparse evaluate --help lists the keys")
    return typed(Words, OmegaConf.to_container(OmegaConf.from_dotlist(list(given))), "")


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


if __name__ == "__main__":
    sys.exit(main())
