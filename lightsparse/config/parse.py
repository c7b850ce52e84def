"""The config of a run: `compose` overrides, `parse` what Hydra composed, `check` it before any compute, name it.

Everything wrong with a config is a ConfigError of one sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.errors import HydraException

from lightsparse.config.build import AttentionChoice, OptimizerChoice, chosen, typed
from lightsparse.config.compose import compose_raw, raised_by_hydra, sentence, unknown_key, with_added
from lightsparse.config.run_identity import config_hash, precision_here
from lightsparse.config.schema import Config, TrainerConfig
from lightsparse.config.targets import ConfigError
from lightsparse.data import DataConfig, TokenizerConfig
from lightsparse.distributed.environment import launched_ranks
from lightsparse.distributed.strategy_config import KINDS, StrategyConfig
from lightsparse.optim.schedules import Schedule


def compose(overrides: Sequence[str] = ()) -> Config:
    """The parsed config of conf/ under command-line overrides such as `attention=dense`. Raises ConfigError."""
    try:
        raw = compose_raw(overrides)
    except Exception as error:
        if not raised_by_hydra(error):
            raise
        raise ConfigError(explain(error, overrides)) from error
    return parse(on_this_machine(raw))


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence for an error of Hydra's composition.

    For a key that conf/ does not have, the schema is asked: it knows the right ones.
    """
    key = unknown_key(error)
    if key is None or key.startswith("hydra."):
        return sentence(error)
    added = with_added(overrides, key)
    try:
        parse(compose_raw(added))
    except ConfigError as refused:
        return str(refused)
    except HydraException as other:
        return sentence(error) if unknown_key(other) == key else explain(other, added)
    return f"{key} has no value in conf/ that could be overridden; write +{key}=… to add it, or list it in its YAML"


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
    """The typed config from the composed one (`compose.plain`), which it keeps as `composed`. Raises ConfigError."""
    node = dict(raw)
    allow = typed_allow(node.get("allow_targets"))
    node["attention"] = AttentionChoice.of(node.get("attention"), allow)
    node["optimizer"] = OptimizerChoice.of(node.get("optimizer"), allow)
    node["tokenizer"] = chosen(TokenizerConfig, node.get("tokenizer"), "tokenizer", allow)
    node["data"] = _data(node.get("data"), node["tokenizer"], allow)
    node["schedule"] = chosen(Schedule, node.get("schedule"), "schedule", allow)
    node["strategy"] = _strategy(node.get("strategy"), allow)
    node["trainer"] = typed(TrainerConfig, node.get("trainer"), "trainer", allow)
    if "precision" in node:
        node["precision"] = precision_here(node["precision"])
    if node.get("name") is None:
        node["name"] = f"{node['attention'].name}-{node['data'].context}-{config_hash(raw)}"
    return dataclasses.replace(typed(Config, node, "", allow), composed=dict(raw))


def _data(node: object, tokenizer: TokenizerConfig, allow: Sequence[str]) -> DataConfig:
    try:
        return chosen(DataConfig, node, "data", allow).choose_tokenizer(tokenizer)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _strategy(node: object, allow: Sequence[str]) -> StrategyConfig:
    """The strategy's node as the kind it names; a key that only other kinds read is refused with their names."""
    try:
        return chosen(StrategyConfig, node, "strategy", allow)
    except ConfigError as error:
        if not isinstance(node, Mapping):
            raise
        own = [kind for kind in KINDS if f"{kind.__module__}.{kind.__qualname__}" == node.get("_target_")]
        for key, value in node.items():
            readers = [kind.kind for kind in KINDS if key in {field.name for field in dataclasses.fields(kind)}]
            if own and readers and own[0].kind not in readers:
                raise ConfigError(
                    f"strategy.{key} is {value}, which strategy={own[0].kind} does not read; "
                    f"use strategy={' or '.join(readers)}"
                ) from error
        raise


def typed_allow(value: object) -> tuple[str, ...]:
    """`allow_targets`, needed before anything else is read."""
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"allow_targets is {value!r}; it must be a list of dotted names")
    return tuple(value)
