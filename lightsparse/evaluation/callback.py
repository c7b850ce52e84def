"""Tasks every n steps of a training: the same results as `lightsparse evaluate`, one folder per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightsparse.config.schema import Config
from lightsparse.evaluation.run import Evaluation, drawn_column
from lightsparse.evaluation.subject import OwnModel


class TaskEvaluation(Callback):
    """eval.tasks of the config, in <folder>/step-<n>; means over the grid go to the loggers as `task_<name>`.

    Every rank holds the whole model and evaluates it, so that none waits for another; the first one writes.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._done = 0  # the last step that was looked at

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, plan = trainer.global_step, self.config.eval.tasks
        if step == self._done:  # inside an accumulation
            return
        self._done = step
        if step % plan.every_n_steps and step < self.config.trainer.max_steps:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        evaluation = Evaluation(
            OwnModel(pl_module.model),  # type: ignore[arg-type]
            data.tokenizer,
            data.config,
            self.folder / f"step-{step}",
            {"name": self.config.name, "step": step, "attention": self.config.attention.name},
            writes=trainer.is_global_zero,
        )
        with torch.random.fork_rng(devices=[]):  # whatever it draws, training goes on as without it
            found = evaluation.tasks(plan.plan)
        means = {
            f"task_{name}": sum(row[drawn_column(rows)] for row in rows) / len(rows) for name, rows in found.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(means, step=step)
