"""summary.json: one run in numbers, and the same as the lines a user sees last."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightsparse.config.schema import Config
from lightsparse.distributed.strategy_config import ContextRanks
from lightsparse.training.measures.loss_sums import Totals
from lightsparse.training.metrics.recorder import Recorder
from lightsparse.training.module import LanguageModel
from lightsparse.utils.machine import MIB, hardware, versions
from lightsparse.utils.text import count_text, duration

WRONG = "1 - val_accuracy"


def summarize(
    config: Config, module: LanguageModel, recorder: Recorder, rows: list[dict[str, float]], *, steps: int, tokens: int
) -> dict[str, Any]:
    """Everything summary.json holds. Rates are means over the run; what was never measured is null.

    rows  of metrics.csv
    """
    scores = module.scores
    validation, strategy = module.validation or Totals(0.0, 0.0, 0.0), config.strategy
    return {
        "finished": True,
        "name": config.name,
        "attention": config.attention.name,
        "objective": config.objective,
        "context": config.data.context,
        "seed": config.seed,
        "steps": steps,
        "stopped_by": _stopped_by(config, steps, None if scores is None else scores.accuracy),
        "tokens": tokens,
        "tokens_per_s": tokens / recorder.train_s if recorder.train_s else None,
        "val_loss": validation.loss,
        "val_bits_per_byte": _number(validation.bits_per_byte),
        "val_perplexity": validation.perplexity,
        "val_tokens": int(validation.targets),
        "val_accuracy": None if scores is None else _number(scores.accuracy),
        "val_exact_match": None if scores is None else _number(scores.exact_match),
        "minimised": "val_bits_per_byte" if scores is None else WRONG,  # by a sweep
        "attention_density": _mean(rows, "attention_density"),
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "flops_per_s": _mean(rows, "flops_per_s"),
        "dense_flops_per_s": _mean(rows, "dense_flops_per_s"),
        "matmul_peak_flops_per_s": recorder.peak,
        "mfu": _mean(rows, "mfu"),
        "peak_memory_mib": recorder.peak_memory / MIB,
        "wall_s": recorder.wall_s,
        "train_s": recorder.train_s,
        "precision": config.precision,
        "matmul_precision": config.matmul_precision,
        "compile": config.compile,
        "devices": config.ranks,
        "strategy": config.strategy.kind,
        "ranks_per_sequence": config.grid.context,
        "split": strategy.split if isinstance(strategy, ContextRanks) else None,
        "key_exchange": strategy.key_exchange if isinstance(strategy, ContextRanks) else None,
        "threads": torch.get_num_threads(),
        "versions": versions() | {"lightning": importlib.metadata.version("lightning")},
        "hardware": hardware(),
    }


def _stopped_by(config: Config, steps: int, accuracy: float | None) -> Any:
    """The callbacks, where one of them must have ended the run: neither its steps nor its goal did."""
    goal = config.eval.stop_accuracy
    ended = steps >= config.trainer.max_steps or (goal is not None and accuracy is not None and accuracy >= goal)
    return None if ended else config.composed["callbacks"]


def show(console: Console, summary: Mapping[str, Any], directory: Path) -> None:
    """Print the summary, a line each, the run directory last."""
    lines = {
        "validation": f"{_verdict(summary)}, loss {summary['val_loss']:.4f}, "
        f"perplexity {summary['val_perplexity']:.2f}",
        "trained": f"{summary['steps']:,} steps, {count_text(summary['tokens'])} tokens "
        f"in {duration(summary['wall_s'])}",
    }
    if summary["tokens_per_s"] and summary["mfu"]:
        lines["speed"] = (
            f"{summary['tokens_per_s']:,.0f} tokens/s, {summary['flops_per_s'] / 1e9:.0f} GFLOP/s, "
            f"{summary['mfu']:.1%} of the matmul peak"
        )
    if summary["attention_density"] is not None:
        lines["density"] = f"{summary['attention_density']:.3f} of dense attention ({summary['attention']})"
    lines["run directory"] = str(directory)
    for name, text in lines.items():
        console.print(f"{name:<13}  {text}")


def sweep_metric(summary: Mapping[str, Any]) -> float:
    """What a sweep minimises: summary["minimised"] names it."""
    return 1.0 - summary["val_accuracy"] if summary.get("minimised") == WRONG else summary["val_bits_per_byte"]


def _verdict(summary: Mapping[str, Any]) -> str:
    if summary.get("val_accuracy") is not None:
        return f"accuracy {summary['val_accuracy']:.4f}, examples all right {summary['val_exact_match']:.4f}"
    return f"{summary['val_bits_per_byte']:.4f} bits per byte"


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def _mean(rows: list[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None
