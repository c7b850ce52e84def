"""When a run saves, and which checkpoints stay: the newest and the best, each written whole or not at all."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightsparse.config.schema import Config
from lightsparse.distributed.environment import gather_objects
from lightsparse.training.checkpoints.background_writer import CheckpointLateError, CheckpointWriter, remove
from lightsparse.training.checkpoints.files import checkpoint_path, checkpoint_steps
from lightsparse.training.checkpoints.random_state import random_state, set_random_state
from lightsparse.training.preemption import Preemption, end_run
from lightsparse.utils.atomic_files import write_text
from lightsparse.utils.compat.lightning import batch_counts
from lightsparse.utils.version import code_version

log = logging.getLogger(__name__)

BEST = "best.json"  # beside the checkpoints: which of them has the lowest validation loss


class StepCheckpoint(Checkpoint):
    """Save `folder/step-<n>.ckpt` where config.checkpoint has it, at the last step and at the best validation.

    saved  called in the training thread with the step of each checkpoint that has come to be on disk
    Where a validation belongs to the step it comes first, so that a checkpoint of step n stands for everything that
    step n does: a run resumed from it neither repeats nor misses a validation.
    Asked to stop (preemption.py: a signal to any rank, or the time is up), all ranks finish the step under way, save
    it and end with code 75.
    """

    def __init__(self, config: Config, folder: Path, writer: CheckpointWriter, saved: Callable[[int], None]) -> None:
        self.config, self.folder, self.writer, self.saved = config, folder, writer, saved
        self.best_step, self.best_loss = 0, math.inf  # 0: none yet
        self._on_disk = self._reported = 0  # of the newest that is written, and of the newest that `saved` knows
        self._done_step = 0  # the last step that went through `_save_if_due`
        self._random_states: list[dict[str, Any]] = []  # of the ranks, from the checkpoint that was loaded
        self._preemption = Preemption(config.trainer.max_time)

    # ---- hooks --------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._preemption.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done_step = self._on_disk = self._reported = trainer.global_step
        if len(self._random_states) == trainer.world_size:  # else the ranks are others: none continues one of them
            set_random_state(self._random_states[trainer.global_rank])
        self._preemption.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not validation_follows(self.config, trainer.global_step):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        loss = pl_module.validation.loss  # equal on all ranks
        is_best = self.config.checkpoint.keep_best and loss < self.best_loss
        if is_best:
            self.best_step, self.best_loss = trainer.global_step, loss
        self._save_if_due(trainer, is_best=is_best)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.writer.finish()
        self._report_saved()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also where all steps had been taken before this start, which then only finishes what the last one began."""
        self.writer.finish()
        self._report_saved()
        if trainer.is_global_zero and trainer.global_step and trainer.global_step in checkpoint_steps(self.folder):
            self._tidy(trainer.global_step, self.best_step, self.best_loss)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):  # the second Ctrl-C: at once
            log.info("stopped; the same command continues from step %d", self._on_disk)
        elif not isinstance(exception, CheckpointLateError | SystemExit):
            try:
                self.writer.finish()  # what is being written is worth having, whatever ends the run
            except Exception as error:
                log.warning("the checkpoint under way was not written: %s", error)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._preemption.stop_listening()

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state_dict["best_step"], state_dict["best_loss"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = gather_objects(random_state())
        checkpoint["config"], checkpoint["code"] = dict(self.config.composed), code_version()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random_states = checkpoint["random"]
        _count_batches_anew(checkpoint, trainer.accumulate_grad_batches)
        saved, now = checkpoint["code"], code_version()
        changed = [f"{name} {saved.get(name)} → {now[name]}" for name in now if now[name] != saved.get(name)]
        if changed:
            log.warning("the run was started with other code: %s; its numbers may change from here", ", ".join(changed))

    # ---- saving -------------------------------------------------------------------------------------------------

    def _save_if_due(self, trainer: Trainer, is_best: bool = False) -> None:
        self.writer.check()
        self._report_saved()
        step = trainer.global_step
        if step == self._done_step and not is_best:  # a micro-batch inside a step leaves the step as it was
            return
        self._done_step = step
        last = self.config.trainer.max_steps
        asked = self._preemption.agreed(trainer)
        stops = asked and step < last
        ends = step >= last or trainer.should_stop
        if stops or is_best or ends or step % self.config.checkpoint.every_n_steps == 0:
            self._save(trainer, step)
        if stops:
            self.writer.finish()
            trainer.strategy.barrier()  # a rank that left before the first has written would have it killed by torchrun
            self._report_saved()
            end_run(asked, step)

    def _save(self, trainer: Trainer, step: int) -> None:
        best_step, best_loss, is_first = self.best_step, self.best_loss, trainer.is_global_zero

        def on_disk() -> None:  # on the first rank, in the writer's thread
            self._tidy(step, best_step, best_loss)
            self._on_disk = step

        trainer.save_checkpoint(checkpoint_path(self.folder, step), storage_options=on_disk)
        if not is_first:
            self._on_disk = step

    def _tidy(self, step: int, best_step: int, best_loss: float) -> None:
        """After the checkpoint of `step` is on disk: name the best one, remove those that are neither new nor best."""
        if best_step:
            write_text(self.folder / BEST, json.dumps({"step": best_step, "val_loss": best_loss}) + "\n")
        older = [saved for saved in checkpoint_steps(self.folder) if saved <= step]
        for outdated in older[: -self.config.checkpoint.keep]:
            if outdated != best_step:
                remove(checkpoint_path(self.folder, outdated))

    def _report_saved(self) -> None:
        if self._on_disk > self._reported:
            self._reported = self._on_disk
            self.saved(self._reported)


def _count_batches_anew(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Lightning counts micro-batches, and tells by them when a step is complete and a validation due.

    Another number of ranks that read different samples makes other micro-batches of the same steps.
    """
    batches = checkpoint["global_step"] * accumulate
    for counts in batch_counts(checkpoint):
        under_way = counts["ready"] - counts["completed"]  # the last one, during whose end the checkpoint was made
        counts |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - under_way}


def validation_follows(config: Config, step: int) -> bool:
    """Whether the run validates after optimizer step `step`: every eval.every_n_steps, and once at the end."""
    return step > 0 and (step % config.eval.every_n_steps == 0 or step >= config.trainer.max_steps)
