"""Rows of metrics: what the steps and validations gave, with clocks, throughput and FLOPs, to every logger."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from lightsparse.config import Config
from lightsparse.training.checkpoint import validation_follows
from lightsparse.training.module import LanguageModel


class Recorder(Callback):
    """One row for step 0 (validation only), every `log_every_n_steps` steps and every validation.

    A row is sent when its step is complete, validation included, so that a killed run leaves no half rows and a
    resumed one repeats none. The clocks travel in the checkpoint: wall_s and the rates cover all restarts.

    started  time.perf_counter() when this process began the run
    """

    def __init__(self, config: Config, *, started: float) -> None:
        self.config, self.started = config, started
        self.peak = float("nan")  # FLOP/s that one device reaches in a matrix product; set once the device is known
        self.row: dict[str, float] = {}  # the newest numbers, sent or not
        self.train_s = 0.0  # seconds spent training, all restarts; validation left out
        self._wall_before = 0.0
        self._mark = 0.0  # perf_counter() up to which train_s has counted
        self._sent_tokens, self._sent_s = 0, 0.0  # at the row before
        self._step = 0

    @property
    def wall_s(self) -> float:
        """Seconds since the start of the run, over all restarts; time lost after the last checkpoint is not in it."""
        return self._wall_before + time.perf_counter() - self.started

    def tokens(self, trainer: Trainer) -> int:
        """Training tokens read up to now, by all ranks."""
        data = self.config.data
        return (
            trainer.global_step * self.config.trainer.accumulate * data.batch_size * data.context * trainer.world_size
        )

    # ---- hooks --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        self._step = trainer.global_step
        self._sent_tokens, self._sent_s = self.tokens(trainer), self.train_s
        self._mark = time.perf_counter()

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
        if validation_follows(step, self.config.eval.every_n_steps, self.config.trainer.max_steps):
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
        self._send(trainer)
        self._mark = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        return {"wall_s": self.wall_s, "train_s": self.train_s}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._wall_before, self.train_s = state_dict["wall_s"], state_dict["train_s"]

    # ---- rows ---------------------------------------------------------------------------------------------------

    def _training_row(self, trainer: Trainer, module: LanguageModel) -> dict[str, float]:
        result = module.step_result
        assert result is not None  # an optimizer step has just been taken
        tokens = self.tokens(trainer)
        tokens_per_s = (tokens - self._sent_tokens) / max(self.train_s - self._sent_s, 1e-9)
        actual, dense = module.model.flops_per_token(self.config.data.context, result.density)
        return {
            "tokens": tokens,
            "wall_s": self.wall_s,
            "train_loss": result.totals.loss,
            "train_bits_per_byte": result.totals.bits_per_byte,
            "train_perplexity": result.totals.perplexity,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_s": tokens_per_s,
            "attention_density": result.density,
            "flops_per_s": actual * tokens_per_s,
            "dense_flops_per_s": dense * tokens_per_s,
            "mfu": actual * tokens_per_s / (self.peak * trainer.world_size),
        }

    def _send(self, trainer: Trainer) -> None:
        self.row.setdefault("tokens", self.tokens(trainer))
        for logger in trainer.loggers:
            logger.log_metrics(self.row, step=trainer.global_step)
        self._sent_tokens, self._sent_s = self.tokens(trainer), self.train_s
