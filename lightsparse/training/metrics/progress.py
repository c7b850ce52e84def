"""What a user sees while it trains: a bar on a terminal, now and then a line elsewhere (a log file, a job's output)."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightsparse.training.metrics.recorder import Recorder
from lightsparse.utils.text import duration

_LINE_EVERY = 10.0  # seconds between plain lines


class TrainingProgress(ProgressBar):
    """Step, loss, bits per byte, tokens per second and time left, and one line per validation that stays."""

    def __init__(self, recorder: Recorder, console: Console) -> None:
        super().__init__()
        self.recorder, self.console = recorder, console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start_step, self._start_time = 0, 0.0
        self._last_step, self._last_line = 0, 0.0  # step shown last, time of the last plain line

    def disable(self) -> None:
        """Lightning calls this on every rank but the first, where the console is silent already."""

    # ---- hooks --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_step, self._start_time = trainer.global_step, time.perf_counter()
        self._last_step, self._last_line = self._start_step, self._start_time
        if self.console.quiet or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            expand=True,
            speed_estimate_period=120,
        )
        self._task = self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, numbers="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:  # inside an accumulation
            return
        self._last_step = trainer.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, numbers=_numbers(self.recorder.row))
        elif time.perf_counter() - self._last_line > _LINE_EVERY:
            self._last_line = time.perf_counter()
            self.console.print(
                f"step {trainer.global_step}/{trainer.max_steps}  {_numbers(self.recorder.row)}{self._left(trainer)}"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = self.recorder.row
        if self._bar is not None:
            self._bar.update(self._task, description="train")
        self.console.print(f"step {trainer.global_step:>6}  validation loss {row['val_loss']:.4f}  {_verdict(row)}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    # ---- words --------------------------------------------------------------------------------------------------

    def _left(self, trainer: Trainer) -> str:
        done = trainer.global_step - self._start_step
        seconds = (time.perf_counter() - self._start_time) / max(done, 1) * (trainer.max_steps - trainer.global_step)
        return f"  {duration(seconds)} left" if done else ""

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _verdict(row: dict[str, float]) -> str:
    """The validation in its own unit: share of right answers where the data asks, else bits per byte."""
    if "val_accuracy" in row:
        return f"accuracy {row['val_accuracy']:.4f}  exact {row['val_exact_match']:.4f}"
    return f"{row['val_bits_per_byte']:.4f} bits/byte"


def _numbers(row: dict[str, float]) -> str:
    loss = "step skipped"
    if "train_loss" in row:
        bits = row.get("train_bits_per_byte")  # symbols have none
        loss = f"loss {row['train_loss']:.3f}" + ("" if bits is None else f"  {bits:.3f} bits/byte")
    return f"{loss}  {row['tokens_per_s']:,.0f} tokens/s"
