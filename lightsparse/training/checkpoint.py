"""Checkpoints that a killed run can trust: written whole or not at all, the newest one never deleted."""

from __future__ import annotations

import logging
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightsparse.files import atomic_write
from lightsparse.training.preemption import EXIT_CODE, Preemption

log = logging.getLogger(__name__)

# What the readers of an archive raise where its bytes make no sense.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError),
    *(EOFError, LookupError, NotImplementedError, RuntimeError, ValueError),
)
_NAME = re.compile(r"step-(\d+)\.ckpt")


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, oldest first. Other files, half-written ones among them, are not listed."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.ckpt"))
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and path of the newest whole checkpoint, or None. Damaged ones are passed over, with a warning each."""
    for step, path in reversed(checkpoint_steps(folder).items()):
        damage = damage_of(path)
        if damage is None:
            return step, path
        log.warning("%s IS DAMAGED (%s) and is passed over for an older checkpoint", path, damage)
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None: torch.save writes a zip archive with a checksum of each part.

    Reads the whole file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        if part is None:
            torch.load(path, map_location="meta", weights_only=True)  # torch reads the archive's frame more strictly
    except _DAMAGE as error:
        return f"no whole archive: {str(error).splitlines()[0]}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if part is None else f"the checksum of {part} differs"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, on disk in whole when `save_checkpoint` returns."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("checkpoints are written to a local path and take no storage_options")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)


class StepCheckpoint(Checkpoint):
    """Save `folder/step-<n>.ckpt` every `every_n_steps` optimizer steps and at the last one; keep the newest `keep`.

    Where a validation belongs to the step it comes first, so that a checkpoint of step n stands for everything that
    step n does: a run resumed from it neither repeats nor misses a validation.
    Asked to stop (preemption.py: a signal to any rank, or the time is up), all ranks finish the step under way, save
    it and end with code 75.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        keep: int,
        max_steps: int,
        validation_every: int,
        max_time: float | None = None,
    ) -> None:
        self.folder, self.every_n_steps, self.keep = folder, every_n_steps, keep
        self.max_steps, self.validation_every = max_steps, validation_every
        self._last_step = 0  # of the last checkpoint saved or loaded
        self._done_step = 0  # the last step that went through `_save_if_due`
        self._preemption = Preemption(max_time)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._preemption.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = self._done_step = trainer.global_step
        self._preemption.listen()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._preemption.stop_listening()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not validation_follows(trainer.global_step, self.validation_every, self.max_steps):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save_if_due(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            log.info("stopped; the same command continues from step %d", self._last_step)

    def _save_if_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._done_step:  # a micro-batch inside a step leaves the step as it was
            return
        self._done_step = step
        stops = self._preemption.is_asked(trainer) and step < self.max_steps
        if stops or step % self.every_n_steps == 0 or step >= self.max_steps or trainer.should_stop:
            self._save(trainer, step)
        if stops:
            log.info("stopped by %s; the same command continues from step %d", self._preemption.reason, step)
            if trainer.is_global_zero:
                self._preemption.requeue()
            raise SystemExit(EXIT_CODE)

    def _save(self, trainer: Trainer, step: int) -> None:
        trainer.save_checkpoint(self.folder / f"step-{step}.ckpt")
        self._last_step = step
        if trainer.is_global_zero:
            older = [path for saved, path in checkpoint_steps(self.folder).items() if saved <= step]
            for path in older[: -self.keep]:
                path.unlink()


def validation_follows(step: int, every_n_steps: int, max_steps: int) -> bool:
    """Whether the run validates after optimizer step `step`: every `every_n_steps`, and once at the end."""
    return step > 0 and (step % every_n_steps == 0 or step >= max_steps)
