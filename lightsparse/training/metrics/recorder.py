"""Rows of metrics: what the steps and validations gave, with clocks, throughput and FLOPs, to every logger."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from lightsparse.config.schema import Config
from lightsparse.distributed.environment import gather_objects
from lightsparse.training.checkpoints.callback import validation_follows
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.measures.attention_stats import CHURN
from lightsparse.training.measures.loss_sums import Totals
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.module import LanguageModel
from lightsparse.utils.atomic_files import write_text
from lightsparse.utils.compat.lightning import validate_now
from lightsparse.utils.machine import current_rss, peak_rss
from lightsparse.utils.version import code_version


class Recorder(Callback):
    """One row for step 0 (validation only), every `log_every_n_steps` steps and every validation.

    A row is sent when its step is complete, validation included, so that a killed run leaves no half rows and a
    resumed one repeats none. Training losses are means over all tokens since the row before: one step's tokens are too
    few for a curve. Sums and clocks travel in the checkpoint, so that rows, wall_s and rates cover all restarts.

    Our own file takes a row at once, and drops those of steps that are trained again. Other loggers cannot take a row
    back: they get it from there once a checkpoint holds its step, and `sent` tells the next start what they have.

    To be made when this process begins the run: its clock starts, and memory counts from what the imports hold.
    """

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        self.started, self._memory_before = time.perf_counter(), current_rss()
        self.peak_memory = 0  # bytes that training took on the busiest rank, on the CPU beyond what the imports hold
        self.peak = float("nan")  # FLOP/s that one device reaches in a matrix product; set once the device is known
        self.row: dict[str, float] = {}  # the newest numbers, sent or not
        self.train_s = 0.0  # seconds spent training, all restarts; validation left out
        self._wall_before = 0.0
        self._mark = 0.0  # perf_counter() up to which train_s has counted
        self._sent_tokens, self._sent_s = 0, 0.0  # at the row before
        self._steps: list[list[float]] = []  # nats, targets, bytes, density of each step since the row before
        self._step = 0
        self._others: dict[str, Logger] = {}  # loggers beside ours; on the first rank only

    @property
    def wall_s(self) -> float:
        """Seconds since the start of the run, over all restarts; time lost after the last checkpoint is not in it."""
        return self._wall_before + time.perf_counter() - self.started

    def tokens(self, trainer: Trainer) -> int:
        """Training tokens read up to now, by all ranks; a sequence that several ranks hold is counted once."""
        return trainer.global_step * self.config.samples_per_step * self.config.data.context

    def measure_memory(self, trainer: Trainer) -> None:
        """Once the training has ended, on every rank."""
        device = trainer.strategy.root_device
        on_gpu = device.type == "cuda"
        mine = torch.cuda.max_memory_allocated(device) if on_gpu else peak_rss() - self._memory_before
        self.peak_memory = max(gather_objects(mine), default=0)

    # ---- hooks --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        names = [name for name, node in self.config.logger.items() if node is not None]
        self._others = dict(zip(names, trainer.loggers[1:], strict=True)) if trainer.is_global_zero else {}
        for logger in self._others.values():
            logger.log_hyperparams({**self.config.composed, "code": code_version()})

    def on_train_start(self, trainer: Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        self._step = trainer.global_step
        self._sent_tokens, self._sent_s = self.tokens(trainer), self.train_s
        self._mark = time.perf_counter()
        if trainer.global_step:
            self.release(trainer.global_step)  # what a start before this one had no time to send

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # inside an accumulation
            return
        self._step = step
        now = time.perf_counter()
        self.train_s, self._mark = self.train_s + now - self._mark, now
        self.row = self._training_row(trainer, pl_module)
        if validation_follows(self.config, step):
            return  # on_validation_end completes and sends the row
        if step % self.config.trainer.log_every_n_steps == 0:
            self._send(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        validation = pl_module.validation
        assert validation is not None  # the module's hook has run
        self.row |= {
            "wall_s": self.wall_s,
            "val_loss": validation.loss,
            "val_bits_per_byte": validation.bits_per_byte,
            "val_perplexity": validation.perplexity,
        }
        if pl_module.scores is not None:
            self.row |= pl_module.scores.row
        if pl_module.choice_churn is not None:
            self.row[CHURN] = pl_module.choice_churn
        self._send(trainer)
        self._mark = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if pl_module.validated != trainer.global_step:  # the run was stopped between two, and now has no steps left
            validate_now(trainer)
        self.release(trainer.global_step)  # a start that had nothing left to train sends what the last one could not

    def state_dict(self) -> dict[str, Any]:
        return {"wall_s": self.wall_s, "train_s": self.train_s, "steps": [list(step) for step in self._steps]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._wall_before, self.train_s = state_dict["wall_s"], state_dict["train_s"]
        self._steps = [list(step) for step in state_dict["steps"]]

    def release(self, step: int) -> None:
        """A checkpoint of `step` is on disk: the rows up to it are final."""
        if not self._others:
            return
        sent = json.loads(self.directory.sent.read_text()) if self.directory.sent.exists() else {}
        rows = read_metrics(self.directory.metrics)
        for name, logger in self._others.items():
            for row in rows:  # none, where the run was rolled back behind what it has
                if sent.get(name, -1) < row["step"] <= step:
                    logger.log_metrics({key: row[key] for key in row if key != "step"}, step=int(row["step"]))
        reached = {name: max(step, sent.get(name, -1)) for name in self._others}
        write_text(self.directory.sent, json.dumps(sent | reached) + "\n")

    # ---- rows ---------------------------------------------------------------------------------------------------

    def _training_row(self, trainer: Trainer, module: LanguageModel) -> dict[str, float]:
        result = module.step_result
        assert result is not None  # an optimizer step has just been taken
        step = result.totals
        if result.taken:
            self._steps.append([step.nats, step.targets, step.bytes, result.density])
        nats, targets, text_bytes, density = (sum(column) for column in zip([0.0] * 4, *self._steps, strict=True))
        totals, density = Totals(nats, targets, text_bytes), density / max(len(self._steps), 1)
        tokens = self.tokens(trainer)
        tokens_per_s = (tokens - self._sent_tokens) / max(self.train_s - self._sent_s, 1e-9)
        actual, dense = module.model.flops_per_token(self.config.data.context, density)
        values = {
            "tokens": tokens,
            "wall_s": self.wall_s,
            "train_loss": totals.loss,
            "train_bits_per_byte": totals.bits_per_byte,
            "train_perplexity": totals.perplexity,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_s": tokens_per_s,
            "attention_density": density,
            "flops_per_s": actual * tokens_per_s,
            "dense_flops_per_s": dense * tokens_per_s,
            "mfu": actual * tokens_per_s / (self.peak * trainer.world_size),
            "skipped_steps": module.health.skipped,
            **result.attention,
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def _send(self, trainer: Trainer) -> None:
        self.row.setdefault("tokens", self.tokens(trainer))
        measured = {name: value for name, value in self.row.items() if not math.isnan(value)}
        trainer.loggers[0].log_metrics(measured, step=trainer.global_step)  # ours
        self._sent_tokens, self._sent_s = self.tokens(trainer), self.train_s
        self._steps = []
