"""Which tasks an evaluation runs, on what grid: of the command line, and of eval.tasks in a training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """Which tasks, on what grid."""

    tasks: tuple[str, ...] = ()  # names of conf/data/*.yaml; own = the task the model was trained on
    lengths: tuple[int, ...] = ()  # tokens of context; [] = that of the training
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the text before what is asked
    examples: int = 10  # per length and depth
    seed: int = 0  # of the examples
    generate: bool = True  # score generated text, too; slower

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths is {list(self.lengths)}; lengths count tokens and must be at least 1")
        if not self.depths or not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise ValueError(f"depths is {list(self.depths)}; depths are shares of the text and must lie in [0, 1]")
        if self.examples < 1:
            raise ValueError(f"examples is {self.examples}; it must be at least 1")


@dataclass(frozen=True)
class TrainingTasks:
    """eval.tasks: the plan of a training, and when."""

    names: tuple[str, ...]  # of conf/data/*.yaml; own = the task of the training; [] = none
    every_n_steps: int  # optimizer steps; the last step is always evaluated
    lengths: tuple[int, ...]  # tokens; [] = data.context
    depths: tuple[float, ...]  # shares of the text before what is asked
    examples: int  # per length and depth
    generate: bool  # score generated text, too; slower

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(f"eval.tasks.every_n_steps is {self.every_n_steps}; it must be at least 1")
        try:
            _ = self.plan
        except ValueError as error:
            raise ValueError(f"eval.tasks.{error}") from error

    @property
    def plan(self) -> EvalPlan:
        return EvalPlan(
            tasks=self.names,
            lengths=self.lengths,
            depths=self.depths,
            examples=self.examples,
            generate=self.generate,
        )
