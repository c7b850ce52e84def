"""One evaluation: which measurements, on what, written where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightsparse.config.eval_plan import EvalPlan
from lightsparse.data.source import DataConfig, SampleSet
from lightsparse.data.tasks.task import TaskConfig
from lightsparse.data.tokens import Tokenizer
from lightsparse.evaluation.distance import by_distance
from lightsparse.evaluation.positions import by_position
from lightsparse.evaluation.report import save_heat_map, save_rows
from lightsparse.evaluation.retrieval import retrieval
from lightsparse.evaluation.subject import Subject
from lightsparse.evaluation.tasks import check_fit, task_named


@dataclass(frozen=True)
class Evaluation:
    """A model, what is known of it, and the folder for its results.

    data    what it was trained on; None = unknown
    about   goes to every JSON file
    writes  whether this process writes them
    """

    subject: Subject
    tokenizer: Tokenizer
    data: DataConfig | None
    folder: Path
    about: Mapping[str, Any]
    writes: bool = True

    def tasks(self, plan: EvalPlan) -> dict[str, list[dict[str, Any]]]:
        """Every task of the plan; rows by name. Writes <task>.json, .csv and .png.

        Raises ConfigError, before anything is measured, for a task that is none or does not fit the model; ValueError
        or DataError for a length that a task cannot have.
        """
        found = {name: task_named(name, self.tokenizer, self.data) for name in plan.tasks}
        for name, task in found.items():
            check_fit(task, name, self._lengths(plan, task), self.subject)
        return {name: self._task(name, task, plan) for name, task in found.items()}

    def positions(self, samples: SampleSet, context: int | None = None) -> list[dict[str, Any]]:
        """Loss by position; positions.json, .csv and .png, or positions-<context>.… for samples of another context."""
        from lightsparse.analysis.curves import Unit, save_loss_by_position

        name = "positions" if context is None else f"positions-{context}"
        rows = by_position(self.subject, samples, self.tokenizer.token_bytes())
        save_rows(rows, self.folder / name, self.about)
        unit: Unit = "loss" if rows[0]["bits_per_byte"] is None else "bits_per_byte"
        points = [(row["start"], row["end"], row[unit]) for row in rows if row[unit] is not None]
        save_loss_by_position(points, self.folder / f"{name}.png", str(self.about["name"]), unit)
        return rows

    def distances(self, samples: SampleSet, reach: int | None) -> list[dict[str, Any]]:
        """Answers by distance; distances.json and .csv."""
        rows = by_distance(self.subject, samples, reach)
        save_rows(rows, self.folder / "distances", {**self.about, "reach": reach})
        return rows

    def _lengths(self, plan: EvalPlan, task: TaskConfig) -> Sequence[int]:
        return plan.lengths or ((self.data or task).context,)

    def _task(self, name: str, task: TaskConfig, plan: EvalPlan) -> list[dict[str, Any]]:
        rows = retrieval(
            self.subject,
            task,
            lengths=self._lengths(plan, task),
            depths=plan.depths,
            examples=plan.examples,
            seed=plan.seed,
            generate=plan.generate,
        )
        if not self.writes:
            return rows
        save_rows(rows, self.folder / name, {**self.about, "task": name, "seed": plan.seed})
        value = drawn_column(rows)
        save_heat_map(rows, value, self.folder / f"{name}.png", f"{name} · {self.about['name']}")
        return rows


def drawn_column(rows: Sequence[Mapping[str, Any]]) -> str:
    """The task's own metric where text was generated, else whole examples right."""
    return "exact_match" if rows[0]["score"] is None else "score"
