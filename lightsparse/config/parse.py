"""The config of a run: `compose` takes overrides, `parse` what Hydra composed, and names the run.

Everything wrong with a config is a ConfigError of one sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from lightsparse.config.build import AttentionChoice, ClassChoice
from lightsparse.config.compose import composed as composed_from
from lightsparse.config.run_identity import config_hash
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.config.typed import chosen, typed, value_of
from lightsparse.data import DataConfig, TokenizerConfig
from lightsparse.distributed.environment import launched_ranks
from lightsparse.distributed.strategy_config import StrategyConfig
from lightsparse.kernels.compute_dtype import default_precision
from lightsparse.optim.schedules import Schedule


def compose(overrides: Sequence[str] = ()) -> Config:
    """The parsed config of conf/ under command-line overrides such as `attention=dense`. Raises ConfigError."""
    return parse(on_this_machine(composed_from(overrides)))


def on_this_machine(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The composed config with the ranks that torchrun or SLURM has started.

    Raises ConfigError where trainer.devices or trainer.num_nodes was given another value than the launcher's.
    """
    node, launched = dict(raw), launched_ranks()
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
    """The typed config from the composed one (`compose.plain`). Raises ConfigError.

    It keeps the composed one as `composed`, with the precision that null leaves to this machine: a run that is resumed
    on another kind of machine is then told of the difference.
    """
    composed = dict(raw)
    if "precision" in composed:
        composed["precision"] = _precision(composed["precision"])
    allow = value_of(tuple[str, ...], composed.get("allow_targets"), "allow_targets")
    node = composed | {
        "attention": AttentionChoice.of(composed.get("attention"), allow),
        "optimizer": ClassChoice.of(composed.get("optimizer"), "optimizer", Optimizer, allow),
        "tokenizer": chosen(TokenizerConfig, composed.get("tokenizer"), "tokenizer", allow),
        "data": chosen(DataConfig, composed.get("data"), "data", allow),
        "schedule": chosen(Schedule, composed.get("schedule"), "schedule", allow),
        "strategy": chosen(StrategyConfig, composed.get("strategy"), "strategy", allow),
    }
    try:
        node["data"] = node["data"].choose_tokenizer(node["tokenizer"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    is_named = composed.get("name") is not None
    config = typed(Config, node if is_named else node | {"name": "unnamed"}, "", allow)
    name = config.name if is_named else f"{config.attention.name}-{config.data.context}-{config_hash(composed)}"
    return dataclasses.replace(config, name=name, composed=composed)


def _precision(given: object) -> object:
    """null as this machine has it; a number, as YAML reads `precision=32`, as the schema has it."""
    return default_precision() if given is None else str(given) if type(given) is int else given
