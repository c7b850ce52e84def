"""The run directory: one path known before the start, what lies in it, and whether a run may start or resume there."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightsparse.config.run_identity import differences
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.environment import is_first_rank
from lightsparse.training.checkpoints.files import checkpoint_steps, newest_checkpoint
from lightsparse.training.checkpoints.lock import lock
from lightsparse.utils.atomic_files import remove_partial_files, write_text


@dataclass(frozen=True)
class Start:
    """How a run begins: at `step` from `checkpoint`, or from nothing (0, None); or not at all, when it has finished."""

    step: int
    checkpoint: Path | None
    summary: dict[str, Any] | None = None  # of the finished run


class RunDirectory:
    """Everything a run leaves, under one path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.sample = path / "sample.txt"
        self.summary = path / "summary.json"
        self.identity = path / "run_id"  # made on the first rank when the directory is
        self.sent = path / ".sent"  # the step up to which each logger beside metrics.csv has all rows

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        return cls(Path(config.runs_dir) / config.name)

    @property
    def stored(self) -> dict[str, Any]:
        """The composed config that the run was started with. Raises ConfigError for a damaged file."""
        try:
            stored = OmegaConf.to_container(OmegaConf.load(self.config))
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ConfigError(_damaged(self.config, error)) from error
        if not isinstance(stored, dict):
            raise ConfigError(_damaged(self.config, f"holds a {type(stored).__name__}"))
        return {str(key): value for key, value in stored.items()}

    @cached_property
    def run_id(self) -> str:
        """What loggers call this run, the same at every start; a new one until `prepare` has written it."""
        return self.identity.read_text(encoding="utf-8").strip() if self.identity.exists() else secrets.token_hex(4)

    def open(self, config: Config) -> Start:
        """`look`, where nobody else is writing: on the first rank a directory that exists is this process's alone from
        then on, until `lock.unlock`.

        Writes nothing else: once nothing is refused any more, `prepare` does. Raises ConfigError as `look` does, and
        where another process is writing.
        """
        if is_first_rank() and self.path.exists():
            lock(self.path)
        return self.look(config)

    def look(self, config: Config) -> Start:
        """Where the run would start from, by config.resume:

        auto   from the newest checkpoint, or from nothing when there is none
        must   from the newest checkpoint
        never  from nothing, in a directory that holds no run
        Raises ConfigError when the directory does not allow that, or holds a run that trains differently.
        """
        newest = newest_checkpoint(self.checkpoints)
        start = Start(0, None) if newest is None else Start(*newest)
        if is_first_rank():  # the others may come after it has written
            self._check(config, start)
        summary = self._summary()
        if summary is not None and is_finished(summary, config):
            return replace(start, summary=summary)
        if start.step > config.trainer.max_steps:
            raise ConfigError(
                f"trainer.max_steps is {config.trainer.max_steps} and {self.path} has trained {start.step} steps; "
                "raise it, or use name=<another> to train as few"
            )
        return start

    def prepare(self, config: Config) -> None:
        """Make the directory and its config.yaml; on the first rank only, after `open`.

        It is this process's alone from then on, until `lock.unlock`. Raises ConfigError where another process has
        started a run there since `open`.
        """
        for folder in (self.checkpoints, self.plots):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # a file system that refuses what its permissions allow
                raise ConfigError(
                    f"runs_dir is {self.path.parent}, where {folder} cannot be made ({error.strerror}); set "
                    "runs_dir=<another folder>"
                ) from error
        if lock(self.path) and self.config.exists():
            raise ConfigError(
                f"{self.path} was started by another process while this one read its data; use the same command again "
                "to continue that run or name=<another> to start beside it"
            )
        for folder in (self.path, self.checkpoints):
            remove_partial_files(folder)
        if not self.identity.exists():
            write_text(self.identity, self.run_id + "\n")
        self.summary.unlink(missing_ok=True)  # of fewer steps: the run is not finished any more
        write_text(self.config, OmegaConf.to_yaml(OmegaConf.create(dict(config.composed))))

    def _check(self, config: Config, start: Start) -> None:
        if config.resume == "never" and self.config.exists():
            raise ConfigError(
                f"{self.path} already holds a run at step {start.step}; use resume=auto to continue it or "
                f"name=<another> to start beside it"
            )
        if config.resume == "must" and start.checkpoint is None:
            raise ConfigError(
                f"{self.path} holds no checkpoint and resume is must; use resume=auto to start from nothing"
            )
        damaged = list(checkpoint_steps(self.checkpoints)) if start.checkpoint is None else []
        if damaged:  # a new start would replace what may still be rescued
            raise ConfigError(
                f"{self.path} holds checkpoints of steps {', '.join(map(str, damaged))}, and none of them is whole; "
                "restore one, remove them all to start from nothing, or use name=<another> to start beside it"
            )
        if start.checkpoint is None or not self.config.exists():
            return
        changed = differences(self.stored, config.composed)
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another config; use the old values to continue it or name=<another> to "
                f"start beside it:\n" + "\n".join(f"  {line}" for line in changed)
            )

    def _summary(self) -> dict[str, Any] | None:
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise ConfigError(_damaged(self.summary, error)) from error
        if not isinstance(summary, dict) or not {"finished", "steps"} <= summary.keys():
            raise ConfigError(_damaged(self.summary, "has no finished and steps"))
        return summary


def _damaged(path: Path, reason: object) -> str:
    """A sentence for a file that this package would not have written."""
    reason = str(reason).split("\n")[0]
    return f"{path} is damaged ({reason}); restore it, or remove it and the run writes it again"


def is_finished(summary: Mapping[str, Any], config: Config) -> bool:
    """Whether a finished run has come as far as it is asked to now: to max_steps, to eval.stop_accuracy, or to where
    one of the same callbacks has ended it.
    """
    goal, accuracy = config.eval.stop_accuracy, summary.get("val_accuracy")
    reached = goal is not None and accuracy is not None and accuracy >= goal
    stopped = summary.get("stopped_by") not in (None, {}) and summary["stopped_by"] == config.composed["callbacks"]
    return summary["finished"] and (summary["steps"] >= config.trainer.max_steps or reached or stopped)
