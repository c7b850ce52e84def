"""Our attentions under names that transformers knows: `attn_implementation="lightsparse_block_sparse"`."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers import AttentionInterface, AttentionMaskInterface

from lightsparse.attention.core import AttentionShape
from lightsparse.config.build import AttentionChoice
from lightsparse.config.compose import composed, conf_dir
from lightsparse.config.targets import ConfigError
from lightsparse.hf.attention import Variant
from lightsparse.hf.key_mask import key_mask
from lightsparse.models.layer_pattern import check_layers
from lightsparse.utils.compat.transformers import KERNEL_WORD
from lightsparse.utils.text import first_line

log = logging.getLogger(__name__)

ATTENTION_FILE = "lightsparse.json"  # in an exported folder: the attention its weights were trained with


def register() -> tuple[str, ...]:
    """Makes every variant of conf/attention/ that suits, as its YAML has it, known as lightsparse_<its file's name>.

    Suitable is what reads queries, keys and values alone. Returns the names; says of the others why not (log, INFO).
    """
    names = []
    for path in sorted((conf_dir() / "attention").glob("*.yaml")):
        name = f"lightsparse_{path.stem}"
        choice = AttentionChoice.of(OmegaConf.to_container(OmegaConf.load(path)))
        try:
            names.append(register_as(Variant(name, choice)))
        except ConfigError as refused:
            log.info("%s", refused)
    return tuple(names)


def register_variant(
    name: str,
    *overrides: str,
    context: int | None = None,
    layer_pattern: str = "S",
    local_window: int | None = None,
) -> str:
    """Makes one attention known as `name`, chosen with the overrides of train.py; returns the name.

        register_variant("lightsparse_512", "attention=sliding_window", "attention.window=512")

    overrides      of attention alone
    context        tokens that attention.density refers to; None = each length alone
    layer_pattern  repeated over the layers: S this attention, D dense, L local, as model.layer_pattern
    local_window   tokens that an L layer reads
    An earlier registration of that name is replaced. Raises ConfigError for a name, override or variant that does not
    fit.
    """
    for word in overrides:
        if not re.match(r"\+{0,2}attention[.=]|~attention\.", word):
            raise ConfigError(f"{word} is given; only attention=… and attention.<key>=… can be chosen here")
    choice = AttentionChoice.of(composed(overrides)["attention"])
    return register_as(Variant(name, choice, context, layer_pattern, local_window))


def register_exported(folder: str | Path, name: str = "lightsparse_exported") -> str:
    """Makes the attention that a folder of `lightsparse export` was trained with known; returns the name.

    Raises ConfigError where the folder does not name one, or names one that needs parameters of its own.
    """
    path = Path(folder) / ATTENTION_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} has no {ATTENTION_FILE}; name a folder written by lightsparse export")
    try:
        stored = json.loads(path.read_bytes())
        attention, context, layers = stored["attention"], stored["context"], stored["layer_pattern"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not as an export leaves it ({first_line(error)}); export it again") from error
    return register_as(Variant(name, AttentionChoice.of(attention), context, layers, stored.get("local_window")))


def refusal(choice: AttentionChoice, shape: AttentionShape) -> str | None:
    """Why a transformers model cannot have this attention, or None where it can.

    Raises ConfigError where the attention cannot take the shape.
    """
    core, name = choice.core, choice.name
    if not core.supports_causal:
        return f"attention={name} is bidirectional only and transformers' decoders are causal"
    if choice.config.dropout:
        return (
            f"attention.dropout is {choice.config.dropout}; in a transformers model config.attention_dropout says it, "
            "leave it 0"
        )
    # Built to be looked at, not to be used; a budget may be a share of the context, of any.
    looked_at = replace(shape, context=shape.context or 4096) if core.selects_from_input else shape
    with torch.random.fork_rng(devices=[]):
        parameters = dict(choice.build(looked_at).named_parameters())
    if parameters:
        return (
            f"attention={name} has parameters of its own ({next(iter(parameters))} …), which a transformers model does "
            "not hold; train and generate with it in lightsparse"
        )
    choice.build(shape)
    return None


def register_as(variant: Variant) -> str:
    """Makes a variant known under its name; see `register_variant`."""
    name = variant.name
    if not re.fullmatch(r"lightsparse_\w+", name) or KERNEL_WORD in name:
        raise ConfigError(
            f"name is {name}; write lightsparse_<letters, digits, _> without the word flash: transformers looks for "
            "other names on the hub"
        )
    try:
        check_layers(variant.layers, variant.local_window, prefix="")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    reason = refusal(variant.choice, AttentionShape(16, 16, 64, 1024, context=variant.context))
    if reason is not None:
        raise ConfigError(reason)
    AttentionInterface.register(name, variant)
    AttentionMaskInterface.register(name, key_mask)
    return name
