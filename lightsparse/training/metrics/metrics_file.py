"""metrics.csv: one row per logged step, appended and flushed at once, so that a killed run loses no row.

Lightning's CSVLogger rewrites its file and deletes it when a run resumes; this one only ever appends. On resume the
rows after the checkpoint's step are dropped, because those steps are trained again.
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightsparse.utils.atomic_files import disk_named, write_text

# The header. Losses are nats per token; training losses, densities and rates cover the steps since the row before.
COLUMNS = (
    "step",  # optimizer steps done
    "tokens",  # training tokens read, all ranks
    "wall_s",  # seconds since the start, over all restarts
    "train_loss",
    "train_bits_per_byte",
    "train_perplexity",
    "val_loss",
    "val_bits_per_byte",
    "val_perplexity",
    "learning_rate",
    "grad_norm",  # before clipping
    "tokens_per_s",
    "attention_density",  # achieved, mean over layers
    "flops_per_s",  # what was computed
    "dense_flops_per_s",  # what dense attention would have had to compute at these tokens per second
    "mfu",  # flops_per_s over the measured matmul peak of all devices
    "skipped_steps",  # of all up to here, those skipped for their loss or gradient
)


class MetricsFile(Logger):
    """A Lightning logger that appends to one CSV file under a fixed header: COLUMNS, and `more` of the attention's own.

    A step has one row: a second call for the newest step replaces it.
    Metrics of other names (of a user's callbacks, say) are not for this file and pass it by.
    """

    def __init__(self, path: Path, more: Sequence[str] = ()) -> None:
        super().__init__()
        self.path, self.columns = path, (*COLUMNS, *more)
        self._last = -1  # the step of the newest row of this process

    @property
    def name(self) -> str:
        """The folder in the run directory where callbacks of Lightning's own, such as ModelCheckpoint, keep files."""
        return "lightning"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: _cell(value) for name, value in metrics.items() if name in self.columns}
        if step is None or not row:
            return
        cells = {**row, "step": str(step)}
        if step == self._last:  # the same row, more of it known: of a validation that ended the run, say
            kept = [each for each in _rows(self.path) if int(each["step"]) < step]
            write_text(self.path, _line(self.columns) + "".join(map(self._row, [*kept, cells])))
            return
        self._last = step
        header = "" if self.path.exists() else _line(self.columns)
        with disk_named(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(header + self._row(cells))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Nothing: config.yaml stands in the same folder."""

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, and a last line that was cut off, in one atomic write."""
        kept = [row for row in _rows(self.path) if int(row["step"]) <= step]
        write_text(self.path, _line(self.columns) + "".join(map(self._row, kept)))

    def _row(self, cells: Mapping[str, str]) -> str:
        return _line([cells.get(name, "") for name in self.columns])


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, oldest first, without their empty cells; an absent file has none."""
    return [{name: float(cell) for name, cell in row.items() if cell} for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole_lines = text[: text.rfind("\n") + 1]  # a killed process may have written half a line
    return list(csv.DictReader(io.StringIO(whole_lines)))


def _line(cells: Iterable[str]) -> str:
    return ",".join(cells) + "\n"


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.8g}"
