"""The config of a run: `compose` overrides, `parse` what Hydra composed, `check` it before any compute, name it.

Everything wrong with a config is a ConfigError of one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from torch import nn

from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.build import AttentionChoice, OptimizerChoice, check_buildable, chosen, typed
from lightsparse.data import DataConfig, TokenizerConfig
from lightsparse.fixed_values import config_hash, precision_here
from lightsparse.models.transformer import Transformer
from lightsparse.overrides import compose_raw, raised_by_hydra, sentence, unknown_key, with_added
from lightsparse.parallel.kinds import KINDS, StrategyConfig
from lightsparse.patterns import BlockLayout
from lightsparse.schema import Config, TrainerConfig
from lightsparse.targets import ConfigError
from lightsparse.training.checkpoint_files import checkpoint_steps
from lightsparse.training.optimizers import parameter_groups
from lightsparse.training.ranks import launched_ranks
from lightsparse.training.schedules import Schedule
from lightsparse.training.sharding import context_split
from lightsparse.training.start import check_start


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
    """The typed config from the composed one (`overrides.plain`). Raises ConfigError."""
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
    return typed(Config, node, "", allow)


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


def check(config: Config) -> None:
    """Everything that can be found wrong without computing: shapes, density, targets, disk. Raises ConfigError."""
    check_disk(config, check_model(config))


def check_model(config: Config) -> Transformer:
    """`check` without the disk; the model on the meta device."""
    for group, kind in (("logger", Logger), ("callbacks", Callback)):
        for name, node in getattr(config, group).items():
            if node is not None:
                check_buildable(node, f"{group}.{name}", kind=kind, allow=config.allow_targets)
    if config.eval.tokens < config.data.context:
        raise ConfigError(
            f"eval.tokens is {config.eval.tokens}; it must hold one sample of data.context={config.data.context} tokens"
        )
    with contextlib.suppress(NotImplementedError):  # no layout before there is an input
        layout_of(config)
    model = meta_model(config)
    if config.init_from is not None and not checkpoint_steps(Path(config.runs_dir, config.name, "checkpoints")):
        check_start(config, model.vocab_size)
    config.optimizer.build(parameter_groups(model, model.layers))
    only = config.trainer.selection_only_steps
    if only and not model.selection_parameters():
        raise ConfigError(
            f"trainer.selection_only_steps is {only}, and attention={config.attention.name} has no parameters that "
            "select, so that nothing would be trained; set it to 0"
        )
    context_split(config, model)
    return model


def meta_model(config: Config) -> Transformer:
    """The model on the meta device: shapes without memory. Raises ConfigError where its attention cannot take them."""
    with torch.device("meta"):
        return Transformer(
            config.model,
            config.attention.build,
            vocab_size=config.data.vocab_size,
            causal=config.objective == "causal",
            context=config.data.context,
        )


def layout_of(config: Config) -> BlockLayout:
    """The layout of one layer over data.context tokens of one document, on the CPU.

    Raises ConfigError when the variant cannot reach what is asked (a density, say), with its reason, and
    NotImplementedError for a variant that chooses its blocks from its input.
    """
    embed_dim, heads, kv_heads, head_dim, _ = config.model.widths
    context, causal = config.data.context, config.objective == "causal"
    shape = AttentionShape(heads, kv_heads, head_dim, embed_dim, causal=causal, context=context)
    ctx = SequenceContext(positions=torch.arange(context)[None])
    try:
        return config.attention.build(shape).layout(context, ctx, torch.device("cpu"))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_disk(config: Config, model: nn.Module) -> None:
    """Refuse a run whose checkpoints do not fit beside each other: weights, and two optimizer states at most."""
    bytes_each = 2 if config.precision == "bf16-true" else 4
    size = 3 * bytes_each * sum(parameter.numel() for parameter in model.parameters())
    run = Path(config.runs_dir, config.name).absolute()
    written = len(list((run / "checkpoints").glob("step-*.ckpt")))
    kept = config.checkpoint.keep + config.checkpoint.keep_best
    needed = size * max(1, kept + 1 - written)  # a new one is whole before the oldest goes
    folder = next(folder for folder in (run, *run.parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "is no folder" if not folder.is_dir() else "cannot be written to"
        raise ConfigError(f"runs_dir is {config.runs_dir}, but {folder} {reason}; set runs_dir=<another folder>")
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"runs_dir is {config.runs_dir}, where {free / 2**30:.1f} GiB are free, and checkpoints of "
            f"{size / 2**30:.1f} GiB with checkpoint.keep={config.checkpoint.keep} take {needed / 2**30:.1f} GiB more; "
            "keep fewer, free space or set runs_dir=<another disk>"
        )
