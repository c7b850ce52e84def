"""What a measurement leaves behind: rows with the command, the machine and the versions; as a table, JSON, Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from lightsparse.utils.machine import hardware, versions

Row = dict[str, object]

# For each kind of report: settings, which go above the table where all rows share them, and results. The JSON file has
# every field.
SETTINGS = {
    "kernels": (
        *("dtype", "seq", "variant", "pattern", "heads", "kv_heads", "head_dim", "block", "threads"),
        *("matmul_precision", "device", "dense_kernel", "backend", "pass", "asked"),
    ),
    "per_query": (
        *("dtype", "seq", "backend", "heads", "kv_heads", "head_dim", "block", "chosen", "threads", "matmul_precision"),
    ),
    "memory": (
        "backend",
        "pass",
        "heads",
        "kv_heads",
        "head_dim",
        "window",
        "dtype",
        "threads",
        "matmul_precision",
        "block",
    ),
    "comm": (
        *("pattern", "seq", "ranks", "exchange", "heads", "kv_heads", "head_dim", "block", "window", "sinks", "dtype"),
    ),
    "train": (
        *("context", "dtype", "threads", "matmul_precision", "optimizer", "depth", "embed_dim", "heads", "kv_heads"),
        *("mlp_dim", "parameters", "block", "window", "documents", "recompute", "text"),
    ),
    "checkpoint": ("context", "threads", "state_mib"),
    "data": ("context", "tokenizer", "packing", "workers", "threads"),
}
PARTS = ("select_ms", "attend_ms")  # shown where some row has them
RESULTS = {
    "kernels": (
        *("density", "ms", "select_ms", "attend_ms", "dense_ms", "speedup", "cpu_speedup"),
        *("flop_ratio", "efficiency"),
    ),
    "per_query": ("ms", "us_per_token", "error"),
    "memory": ("seq", "increase_mib", "bytes_per_token", "growth", "peak_rss_mib"),
    "comm": ("predicted_mib", "counted_mib", "of_ring"),
    "train": (
        *("model", "density", "ms_per_step", "us_per_token", "tokens_per_s", "vs_transformers", "peak_rss_mib"),
        *("layout_share", "loss"),
    ),
    "checkpoint": ("saving", "ms_per_step", "cost", "cpu_cost", "stall_ms"),
    "data": ("work", "tokens", "seconds", "tokens_per_s", "share_of_step"),
}


@dataclass
class Report:
    """One run of one benchmark."""

    kind: str  # kernels, per_query, memory, train, checkpoint, comm or data
    command: str  # what to type to run it again
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was compared, and what was left out and why
    hardware: dict[str, object] = field(default_factory=hardware)
    versions: dict[str, str] = field(default_factory=versions)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        for line in (self.machine(), self.software(), self.shared_settings()):
            console.print(line, markup=False, highlight=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        widths = [max(len(text) for text in (name, *map(cell, self._column(name)))) for name in self.columns()]
        too_wide = sum(widths) + 3 * len(widths) > console.width  # two blanks and a line between columns
        for name in self.columns():
            justify: Literal["left", "right"] = "right" if self._is_number(name) else "left"
            table.add_column(name.replace("_", "\n") if too_wide else name, justify=justify, vertical="bottom")
        for row in self.rows:
            table.add_row(*(cell(row.get(name)) for name in self.columns()))
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", markup=False, highlight=False)

    def markdown(self) -> str:
        """The rows as a Markdown table; the command, machine, versions, shared settings and notes above it."""
        columns = self.columns()
        lines = ["```bash", self.command, "```", ""]
        about = {"Machine": self.machine(), "Versions": self.software(), "In all rows": self.shared_settings()}
        lines += [f"- {name}: {text}" for name, text in about.items()]
        lines += [f"- {note}" for note in self.notes]
        lines += ["", "| " + " | ".join(columns) + " |"]
        lines += ["|" + "|".join("---:" if self._is_number(name) else "---" for name in columns) + "|"]
        lines += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def columns(self) -> tuple[str, ...]:
        results = (name for name in RESULTS[self.kind] if name not in PARTS or self._is_number(name))
        return (*(name for name in SETTINGS[self.kind] if not self._is_shared(name)), *results)

    def shared_settings(self) -> str:
        """`seq 16384, heads 4, …`: the settings that all rows have in common."""
        shared = [name for name in SETTINGS[self.kind] if self._is_shared(name)]
        return ", ".join(
            f"{name.replace('_', ' ')} {cell(self.rows[0][name])}"
            for name in shared
            if self.rows[0].get(name) is not None
        )

    def _column(self, name: str) -> list[object]:
        return [row.get(name) for row in self.rows]

    def _is_shared(self, name: str) -> bool:
        return len(set(self._column(name))) == 1

    def _is_number(self, name: str) -> bool:
        return any(isinstance(value, int | float) for value in self._column(name))

    def software(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())

    def machine(self) -> str:
        about, gpu = self.hardware, self.hardware["gpu"]
        flags = about["flags"] if isinstance(about["flags"], list) else []
        parts = [f"{about['cpu']} ({', '.join(flags)})", f"{about['cores']} cores", f"{about['memory_gib']} GiB"]
        parts += [str(gpu)] if gpu else []
        parts += [f"load before the run {about['load_before']}"]
        return ", ".join(parts)


def load(path: Path) -> Report:
    """A report that `save` wrote. Raises ValueError when the file is something else, FileNotFoundError without it."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("kind") not in RESULTS:
        raise ValueError(f"{path} holds no report; give a file that `lightsparse bench … --json` wrote")
    return Report(**found)


def cell(value: object) -> str:
    """A value as people read it: three significant digits, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
