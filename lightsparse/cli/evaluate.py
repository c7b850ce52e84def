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

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import RenderableType

from lightsparse.cli.words import command, options
from lightsparse.config.eval_plan import EvalPlan


@dataclass(frozen=True, kw_only=True)
class Options(EvalPlan):
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


@command
def main(words: list[str]) -> Iterable[RenderableType]:
    asked = options(Options, words)
    from lightsparse.cli.work.evaluate import evaluate_model, evaluate_run, evaluate_sweep

    if asked.sweep is not None:
        return evaluate_sweep(asked.sweep, asked, out=asked.out, reach=asked.reach)
    if asked.model is not None and asked.out is not None:
        return evaluate_model(asked.model, asked, asked.out)
    assert asked.run is not None
    own = ("step", "out", "positions", "context", "distances", "reach")
    return evaluate_run(asked.run, asked, **{name: getattr(asked, name) for name in own})
