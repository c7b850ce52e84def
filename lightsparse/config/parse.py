"""The config of a run: `compose` overrides, `parse` what Hydra composed, `check` it before any compute, name it.

Everything wrong with a config is a ConfigError of one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightsparse.config.build import AttentionChoice, OptimizerChoice, chosen, typed
from lightsparse.config.compose import composed
from lightsparse.config.run_identity import config_hash, precision_here
from lightsparse.config.schema import Config, TrainerConfig
from lightsparse.config.targets import ConfigError
from lightsparse.data import DataConfig, TokenizerConfig
from lightsparse.distributed.environment import launched_ranks
from lightsparse.distributed.strategy_config import StrategyConfig
from lightsparse.optim.schedules import Schedule


def compose(overrides: Sequence[str] = ()) -> Config:
    """The parsed config of conf/ under command-line overrides such as `attention=dense`. Raises ConfigError."""
    return parse(on_this_machine(composed(overrides)))


def on_this_machine(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The composed config with what null leaves to the machine, and the ranks that torchrun or SLURM has started.

    A run keeps these values: where it is continued on another kind of machine, a difference is named.
    Raises ConfigError where trainer.devices or trainer.num_nodes was given another value than the launcher's.
    """
    node, launched = dict(raw), launched_ranks()
    if "precision" in node:
        node["precision"] = precision_here(node["precision"])
    if launched is None or not isinstance(node.get("trainer"), Mapping):
        return node
    here = dict(zip(("devices", "num_nodes"), launched, strict=True))
    for key, started in here.items():
        if node["trainer"].get(key) not in (1, started):
            raise ConfigError(
                f"trainer.{key} is {node['trainer'][key]} and the launcher has started {started}; "
                "leave it out: under torchrun and SLURM it follows from them"
            )
    node["trainer"] = {**node["trainer"], **here}
    return node


def parse(raw: Mapping[str, Any]) -> Config:
    """The typed config from the composed one (`overrides.plain`). Raises ConfigError."""
    node = dict(raw)
    allow = typed_allow(node.get("allow_targets"))
    node["attention"] = AttentionChoice.of(node.get("attention"), allow)
    node["optimizer"] = OptimizerChoice.of(node.get("optimizer"), allow)
    node["tokenizer"] = chosen(TokenizerConfig, node.get("tokenizer"), "tokenizer", allow)
    node["data"] = _data(node.get("data"), node["tokenizer"], allow)
    node["schedule"] = chosen(Schedule, node.get("schedule"), "schedule", allow)
    node["strategy"] = chosen(StrategyConfig, node.get("strategy"), "strategy", allow)
    node["trainer"] = typed(TrainerConfig, node.get("trainer"), "trainer", allow)
    if "precision" in node:
        node["precision"] = precision_here(node["precision"])
    if node.get("name") is None:
        node["name"] = f"{node['attention'].name}-{node['data'].context}-{config_hash(raw)}"
    return typed(Config, node, "", allow)


def _data(node: object, tokenizer: TokenizerConfig, allow: Sequence[str]) -> DataConfig:
    try:
        return chosen(DataConfig, node, "data", allow).choose_tokenizer(tokenizer)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def typed_allow(value: object) -> tuple[str, ...]:
    """`allow_targets`, needed before anything else is read."""
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"allow_targets is {value!r}; it must be a list of dotted names")
    return tuple(value)
