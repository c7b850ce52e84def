"""What names a run, and what a resumed one may not change: the values of its config that decide what is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightsparse.config.schema import TrainerConfig, samples_per_step
from lightsparse.config.typed import chosen, typed, value_of
from lightsparse.distributed.strategy_config import StrategyConfig

# Keys that may change between the parts of one run: they say how long, where and how watched, not what is trained.
# Of ranks and batches only their product counts, the samples of an optimizer step.
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


def config_hash(composed: Mapping[str, Any]) -> str:
    """Eight hex digits that differ between configs that train differently; FREE_KEYS do not count."""
    text = json.dumps(_what_is_trained(composed), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The keys in which two composed configs train differently, a line each with both values; see `config_hash`."""
    before, now = _what_is_trained(stored), _what_is_trained(present)
    return [
        f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} here"
        for key in sorted(before.keys() | now.keys())
        if key not in before or key not in now or before[key] != now[key]
    ]


def _what_is_trained(composed: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of all that a resumed run may not change."""
    allow, data = composed.get("allow_targets", ()), composed.get("data", {})
    trainer = typed(TrainerConfig, composed.get("trainer"), "trainer", allow)
    strategy = chosen(StrategyConfig, composed.get("strategy"), "strategy", allow)
    samples = samples_per_step(trainer, strategy, value_of(int, data.get("batch_size"), "data.batch_size"))
    return {"samples per optimizer step": samples} | {
        key: value
        for key, value in _leaves(composed).items()
        if not (key.startswith("strategy.") and value in (None, "none"))  # a hook that is not used
    }


def _leaves(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, without FREE_KEYS and what lies below them."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        if f"{prefix}{key}" not in FREE_KEYS:
            below = _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
            values.update(below)
    return values
