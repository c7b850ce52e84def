"""sweep.json: the trials of a sweep and what became of them, rewritten whole at every change.

A killed sweep leaves it as of the last change; the same command reads it and resumes the sweep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightsparse.config.targets import ConfigError
from lightsparse.utils.atomic_files import write_text

# running   under way, or the sweep was killed meanwhile
# stopped   ended with code 75: not done, and the same command resumes it
# failed    ended in another way; only asked for it is tried again
Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class TrialRecord:
    overrides: list[str]  # of train.py, all of them
    varied: list[str]  # those that the sweep has chosen
    run: str  # the run directory
    ranks: int
    status: Status
    sweep_metric: float | None = None  # what sweepers minimise
    minimised: str = "val_bits_per_byte"  # what that is, in terms of summary.json
    exit_code: int | None = None  # of the last start
    seconds: float = 0.0  # of all starts
    starts: int = 0
    error: str | None = None  # the last line that a trial wrote before it failed or stopped
    log: str | None = None  # what it wrote, below the sweep's directory

    @property
    def title(self) -> str:
        """The chosen values, as one reads them in a line."""
        return " ".join(self.varied) or self.run

    @property
    def result(self) -> str:
        """The sweep metric, as one reads it in a line; of a finished trial."""
        assert self.sweep_metric is not None
        name = "bits per byte" if self.minimised == "val_bits_per_byte" else f"= {self.minimised}"
        return f"{self.sweep_metric:.4f} {name}"


@dataclass
class SweepRecord:
    """All trials, in the order in which they were asked for."""

    directory: Path
    command: list[str]  # the overrides after -m
    trials: list[TrialRecord] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.directory / "sweep.json"

    def of(self, overrides: Sequence[str]) -> TrialRecord | None:
        """The trial with these overrides."""
        return next((trial for trial in self.trials if trial.overrides == list(overrides)), None)

    def with_status(self, status: Status) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.status == status]

    def save(self) -> None:
        """Write the file, atomically; the directory must exist."""
        content = {"name": self.directory.name, "command": self.command, "trials": [asdict(one) for one in self.trials]}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def load_record(directory: Path) -> SweepRecord | None:
    """The sweep of a directory; None where there is none. Raises ConfigError for a file that is something else."""
    path = directory / "sweep.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return SweepRecord(directory, content["command"], [TrialRecord(**trial) for trial in content["trials"]])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no record of a sweep ({error}); remove it, finished runs stay") from error
