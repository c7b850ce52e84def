"""What names a run, and what a resumed one may not change: the values of its config that decide what is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightsparse.kernels.compute_dtype import default_precision

# Keys that may change between the parts of one run: they say how long, where and how watched, not what is trained.
# Of ranks and batches only their product counts, the samples of an optimizer step; `_fixed_values` adds it.
FREE_KEYS = (
    "name",
    "doctor",
    "resume",
    "runs_dir",
    "threads",
    "allow_targets",
    "logger",
    "callbacks",
    "checkpoint",
    "health",
    "eval.every_n_steps",
    "eval.sample_tokens",
    "eval.stop_accuracy",
    "eval.tasks",
    "strategy._target_",
    "strategy.context_parallel_size",
    "strategy.split",
    "strategy.key_exchange",
    "strategy.timeout",
    "trainer.accumulate_grad_batches",
    "trainer.global_batch",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.progress",
    "trainer.log_every_n_steps",
    "data.batch_size",
    "data.num_workers",
    "data.cache",
)


def config_hash(raw: Mapping[str, Any]) -> str:
    """Eight hex digits that differ between configs that train differently; FREE_KEYS do not count."""
    text = json.dumps(_fixed_values(raw), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The keys in which two raw configs train differently, one line each with both values; FREE_KEYS do not count."""
    before, now = _fixed_values(stored), _fixed_values(present)
    return [
        f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]


_ABSENT = object()
_AS_ABSENT = (("init_from", None), ("trainer.selector_only_steps", None), ("trainer.selector_only_steps", 0))


def _fixed_values(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of all that a resumed run may not change."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if dotted in FREE_KEYS or (prefix == "strategy." and value in (None, "none")):  # a hook that is not used
            continue
        if (dotted, value) in _AS_ABSENT:
            continue
        if isinstance(value, Mapping):
            values |= _fixed_values(value, f"{dotted}.")
        else:
            values[dotted] = value
    if not prefix:
        values["samples per optimizer step"] = _samples_per_step(node)
        if "precision" in values:
            values["precision"] = precision_here(values["precision"])
    return values


def _samples_per_step(raw: Mapping[str, Any]) -> int:
    """`Config.samples_per_step` of a raw config; a stored one may lack what is newer."""
    trainer, strategy, data = (raw.get(group, {}) for group in ("trainer", "strategy", "data"))
    if trainer.get("global_batch"):
        return trainer["global_batch"]
    ranks = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    readers = ranks // (strategy["context_parallel_size"] or ranks) if "context_parallel_size" in strategy else ranks
    return data.get("batch_size", 1) * (trainer.get("accumulate_grad_batches") or 1) * readers


def precision_here(given: object) -> object:
    """null as this machine has it; a number, as `precision=32` reads, as the schema has it."""
    return default_precision() if given is None else str(given) if type(given) is int else given
