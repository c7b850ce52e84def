"""What a measurement leaves behind: rows with the command, the machine and the versions; as a table, JSON, Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lightsparse.bench.machine import hardware, versions

Row = dict[str, object]

# For each kind of report: settings, which go above the table where all rows share them, and results. The JSON file has
# every field.
SETTINGS = {
    "kernels": ("pattern", "seq", "heads", "kv_heads", "head_dim", "block", "dtype", "threads"),
    "memory": ("backend", "pass", "heads", "kv_heads", "head_dim", "window", "dtype", "threads", "block"),
    "train": ("context", "dtype", "threads", "optimizer"),
}
RESULTS = {
    "kernels": ("density", "backend", "pass", "ms", "dense_ms", "speedup", "cpu_speedup", "flop_ratio", "efficiency"),
    "memory": ("seq", "increase_mib", "bytes_per_token", "growth", "peak_rss_mib"),
    "train": ("model", "density", "ms_per_step", "tokens_per_s", "vs_transformers", "peak_rss_mib", "loss"),
}


@dataclass
class Report:
    """One run of one benchmark."""

    kind: str  # kernels, memory or train
    command: str  # what to type to run it again
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was compared, and what was left out and why
    hardware: dict[str, object] = field(default_factory=hardware)
    versions: dict[str, str] = field(default_factory=versions)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        console.print(self.machine(), markup=False, highlight=False)
        console.print(self.shared_settings(), markup=False, highlight=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in self.columns():
            is_number = any(isinstance(row.get(name), int | float) for row in self.rows)
            table.add_column(name, justify="right" if is_number else "left")
        for row in self.rows:
            table.add_row(*(cell(row.get(name)) for name in self.columns()))
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", markup=False, highlight=False)

    def markdown(self) -> str:
        """The rows as a Markdown table with the command and the hardware above it."""
        columns = self.columns()
        about = f"{self.machine()}. {self.shared_settings()}. {' '.join(self.notes)}"
        lines = ["```bash", self.command, "```", "", about, ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in SETTINGS[self.kind] if not self._is_shared(name)) + RESULTS[self.kind]

    def shared_settings(self) -> str:
        """`seq 16384, heads 4, …`: the settings that all rows have in common."""
        shared = [name for name in SETTINGS[self.kind] if self._is_shared(name)]
        return ", ".join(f"{name} {cell(self.rows[0].get(name))}" for name in shared)

    def _is_shared(self, name: str) -> bool:
        return len({row.get(name) for row in self.rows}) == 1

    def machine(self) -> str:
        about, gpu = self.hardware, self.hardware["gpu"]
        flags = about["flags"] if isinstance(about["flags"], list) else []
        parts = [f"{about['cpu']} ({', '.join(flags)})", f"{about['cores']} cores", f"{about['memory_gib']} GiB"]
        parts += [str(gpu)] if gpu else []
        parts += [f"torch {self.versions['torch']}", f"load before the run {about['load_before']}"]
        return ", ".join(parts)


def load(path: Path) -> Report:
    """A report that `save` wrote. Raises ValueError when the file is something else, FileNotFoundError without it."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("kind") not in RESULTS:
        raise ValueError(f"{path} holds no report; give a file that `python -m lightsparse.bench … --json` wrote")
    return Report(**found)


def cell(value: object) -> str:
    """A value as people read it: three significant digits, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
