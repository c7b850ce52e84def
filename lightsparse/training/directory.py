"""The run directory: one path known before the start, what lies in it, and whether a run may begin or go on there."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from lightsparse.config import differences
from lightsparse.files import remove_partial_files, write_text
from lightsparse.targets import ConfigError
from lightsparse.training.checkpoint_files import newest_checkpoint
from lightsparse.training.lock import lock
from lightsparse.training.ranks import is_first_rank


@dataclass(frozen=True)
class Start:
    """How a run begins: at `step` from `checkpoint`, or from nothing (0, None); or not at all, when it has finished."""

    step: int
    checkpoint: Path | None
    summary: dict[str, Any] | None = None  # of the finished run


@dataclass(frozen=True)
class RunDirectory:
    """Everything a run leaves, under one path."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    @property
    def identity(self) -> Path:
        return self.path / "run_id"

    @property
    def run_id(self) -> str:
        """What loggers call this run, the same at every start: made on the first rank when the directory is."""
        return self.identity.read_text(encoding="utf-8").strip()

    @property
    def sent(self) -> Path:
        """The step up to which loggers beside metrics.csv have all rows."""
        return self.path / ".sent"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def open(self, resume: Literal["auto", "must", "never"], raw: Mapping[str, Any], max_steps: int) -> Start:
        """Where the run starts from; makes the directory and its config.yaml on the first rank.

        auto   from the newest checkpoint, or from nothing when there is none
        must   from the newest checkpoint
        never  from nothing, in a directory that holds no run
        raw    the composed config, as it goes to config.yaml
        On the first rank the directory is this process's alone from then on, until `lock.unlock`.
        Raises ConfigError when the directory does not allow that, holds a run that trains differently, or is being
        written by another process.
        """
        is_first = is_first_rank()  # the others may come after this one has written, and only look
        if is_first and self.path.exists():
            lock(self.path)
        newest = newest_checkpoint(self.checkpoints)
        start = Start(0, None) if newest is None else Start(*newest)
        if is_first:
            self._check(resume, start, raw)
        summary = self._summary()
        if summary is not None and is_finished(summary, raw, max_steps):
            return replace(start, summary=summary)
        if is_first:
            self._prepare(raw)
        return start

    def _check(self, resume: str, start: Start, raw: Mapping[str, Any]) -> None:
        if resume == "never" and self.config.exists():
            raise ConfigError(
                f"{self.path} already holds a run at step {start.step}; use resume=auto to continue it or "
                f"name=<another> to start beside it"
            )
        if resume == "must" and start.checkpoint is None:
            raise ConfigError(
                f"{self.path} holds no checkpoint and resume is must; use resume=auto to start from nothing"
            )
        if start.checkpoint is None or not self.config.exists():
            return
        stored = OmegaConf.to_container(OmegaConf.load(self.config))
        assert isinstance(stored, dict)  # as _prepare wrote it
        changed = differences({str(key): value for key, value in stored.items()}, raw)
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another config; use the old values to continue it or name=<another> to "
                f"start beside it:\n" + "\n".join(f"  {line}" for line in changed)
            )

    def _prepare(self, raw: Mapping[str, Any]) -> None:
        for folder in (self.checkpoints, self.plots):
            folder.mkdir(parents=True, exist_ok=True)
        lock(self.path)
        for folder in (self.path, self.checkpoints):
            remove_partial_files(folder)
        if not self.identity.exists():
            write_text(self.identity, secrets.token_hex(4) + "\n")
        self.summary.unlink(missing_ok=True)  # of fewer steps: the run is not finished any more
        write_text(self.config, OmegaConf.to_yaml(OmegaConf.create(dict(raw))))

    def _summary(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.summary.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None


def is_finished(summary: Mapping[str, Any], raw: Mapping[str, Any], max_steps: int) -> bool:
    """Whether a finished run has come as far as it is asked to now: to max_steps, or to eval.stop_accuracy."""
    goal, accuracy = raw.get("eval", {}).get("stop_accuracy"), summary.get("val_accuracy")
    reached = goal is not None and accuracy is not None and accuracy >= goal
    return summary["finished"] and (summary["steps"] >= max_steps or reached)
