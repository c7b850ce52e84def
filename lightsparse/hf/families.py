"""config.json ↔ ModelConfig, for the families of transformers whose decoder ours is: Llama, Mistral, Qwen2, Qwen3.

What a config.json asks for and our model cannot compute exactly is one error that names the key. Four keys are not of
the model but of training, and are left to the run: attention_dropout, initializer_range, pad_token_id, use_cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from lightsparse.config.targets import ConfigError
from lightsparse.models.rope import RopeConfig
from lightsparse.models.transformer import ModelConfig
from lightsparse.utils.text import first_line


@dataclass(frozen=True)
class Family:
    architecture: str  # of config.json, a class of transformers
    model_type: str
    qk_norm: bool = False
    qkv_bias: bool = False


# In the order in which an export looks for the one that has a model's parts.
FAMILIES = (
    Family("LlamaForCausalLM", "llama"),
    Family("Qwen3ForCausalLM", "qwen3", qk_norm=True),
    Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
    Family("MistralForCausalLM", "mistral"),
)

# Values that our model has built in; what lacks the key has them too.
_BUILT_IN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "is_causal": (True,),
    "quantization_config": (None,),
    "pretraining_tp": (1,),
}

_ROPE_KEYS = {  # rope_type → ours; of ours → the key in rope_parameters
    "default": ("none", {}),
    "linear": ("linear", {"factor": "factor"}),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            "original_context": "original_max_position_embeddings",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
        },
    ),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            "original_context": "original_max_position_embeddings",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        },
    ),
}


@dataclass(frozen=True)
class Described:
    """What a folder's config.json says of its model."""

    architecture: str
    model: ModelConfig
    vocab_size: int  # rows of the embedding


def described(folder: str | Path) -> Described:
    """The model in a folder written by `save_pretrained`. Nothing of its weights is read.

    Raises ConfigError for a folder without config.json, another family, and whatever our model cannot represent.
    """
    path = Path(folder) / "config.json"
    if not path.is_file() and Path(folder, "checkpoints").is_dir():
        raise ConfigError(f"{folder} is a run; export it first: lightsparse export run={folder} out=<folder>")
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json; name a folder that transformers' save_pretrained has written")
    family = _family(path)
    config, frequencies = _built(path)
    for key, allowed in _BUILT_IN.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{path} has {key}={value!r}; our model knows only {key}={allowed[0]!r}")
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other:
        raise ConfigError(f"{path} has layer_types {', '.join(sorted(other))}; our model knows only full_attention")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope, unknown = _rope(config.rope_parameters, path)
    try:
        model = ModelConfig(
            depth=config.num_hidden_layers,
            embed_dim=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            mlp_dim=config.intermediate_size,
            rope=RopeConfig(**rope),
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
            tie_embeddings=bool(config.tie_word_embeddings),
            norm_eps=config.rms_norm_eps,
        )
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    ours = model.rope.frequencies(head_dim)
    if ours[0].shape != frequencies[0].shape or not all(
        torch.allclose(torch.as_tensor(here), torch.as_tensor(there), rtol=1e-5, atol=0)
        for here, there in zip(ours, frequencies, strict=True)
    ):
        keys = f"{', '.join(unknown)} in " if unknown else ""
        raise ConfigError(
            f"{path} has {keys}rope_parameters {config.rope_parameters}, by which transformers turns positions "
            f"otherwise than our {model.rope.scaling} does"
        )
    return Described(family.architecture, model, config.vocab_size)


def differences(model: ModelConfig, there: ModelConfig) -> list[str]:
    """The overrides that make `model` the form of `there`; empty where weights of the one fit the other.

    Positions may be stretched: where the file's RoPE is not scaled, any scaling of its base fits, and where it is, a
    larger factor of the same scaling.
    """
    here, wanted = _form(model), _form(there)
    wrong = {name for name, value in wanted.items() if here[name] != value}
    if wrong & set(there.widths._fields):  # then those left null, which follow from the others, may change too
        wrong |= {name for name, value in wanted.items() if getattr(model, name) != value}
    words = [f"model.{name}={_written(value)}" for name, value in wanted.items() if name in wrong]
    rope = model.rope
    stretched = there.rope.scaling in ("none", rope.scaling) and rope.factor >= there.rope.factor
    if there.rope.scaling != "none":
        stretched = stretched and replace(there.rope, factor=rope.factor) == rope
    if rope.base != there.rope.base or not stretched:
        words += [
            f"model.rope.{each.name}={_written(getattr(there.rope, each.name))}"
            for each in fields(RopeConfig)
            if getattr(rope, each.name) != getattr(there.rope, each.name)
        ]
    return words


def _form(model: ModelConfig) -> dict[str, object]:
    flags = {name: getattr(model, name) for name in ("qk_norm", "qkv_bias", "tie_embeddings", "norm_eps")}
    return {"depth": model.depth, **model.widths._asdict(), **flags}


def _written(value: object) -> str:
    """A value as YAML writes it."""
    return "null" if value is None else str(value).lower()


def family_of(model: ModelConfig) -> Family:
    """The family that has the model's parts. Raises ConfigError where there is none."""
    for family in FAMILIES:
        if (family.qk_norm, family.qkv_bias) == (model.qk_norm, model.qkv_bias):
            return family
    raise ConfigError(
        "model.qk_norm and model.qkv_bias are both true, which no family of transformers has; it cannot be exported"
    )


def their_config(
    model: ModelConfig,
    vocab_size: int,
    *,
    context: int,
    dtype: str = "float32",
    attention_dropout: float = 0.0,
    bos: int | None = None,
    eos: int | None = None,
) -> PreTrainedConfig:
    """The config of the transformers model that computes what ours computes with dense attention.

    context  tokens of the samples it was trained on: max_position_embeddings
    Raises ConfigError where no family has the model's parts.
    """
    family = family_of(model)
    widths, rope = model.widths, model.rope
    if rope.scaling == "ntk":  # a constant ntk is another base
        base = rope.base * rope.factor ** (widths.head_dim / (widths.head_dim - 2))
        rope = RopeConfig(base=base)
    kind, keys = next((kind, keys) for kind, (ours, keys) in _ROPE_KEYS.items() if ours == rope.scaling)
    parameters = {theirs: getattr(rope, ours) for ours, theirs in keys.items() if getattr(rope, ours) is not None}
    if rope.original_context is not None:
        context = max(context, round(rope.factor * rope.original_context))
    return AutoConfig.for_model(
        family.model_type,
        architectures=[family.architecture],
        vocab_size=vocab_size,
        hidden_size=widths.embed_dim,
        intermediate_size=widths.mlp_dim,
        num_hidden_layers=model.depth,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.kv_heads,
        head_dim=widths.head_dim,
        max_position_embeddings=context,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": kind, "rope_theta": rope.base, **parameters},
        tie_word_embeddings=model.tie_embeddings,
        attention_dropout=attention_dropout,
        dtype=dtype,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def _family(path: Path) -> Family:
    try:
        stored = json.loads(path.read_bytes())
        kind, architectures = stored.get("model_type"), stored.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as a model's config: {first_line(error)}") from error
    for family in FAMILIES:
        if family.model_type == kind and architectures in ([], [family.architecture]):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    reason = "; its layers without RoPE are none of ours" if kind == "smollm3" else ""
    raise ConfigError(
        f"{path} has model_type={kind!r}, architectures={architectures}{reason}; our model takes {known} (SmolLM and "
        "SmolLM2 are Llamas)"
    )


def _built(path: Path) -> tuple[PreTrainedConfig, tuple[Tensor, float]]:
    """The config as a model built from it has it, and that model's radians per token [D/2] and scale of cos and sin.

    Some keys are settled only there: original_max_position_embeddings beside rope_scaling replaces the one inside.
    """
    try:
        config = AutoConfig.from_pretrained(str(path.parent), local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config, attn_implementation="eager")
        rotary = type(model.rotary_emb)(model.config)
    except Exception as error:  # each key has a check of its own there, and each check an error of its own
        raise ConfigError(f"{path} is refused by transformers: {first_line(error)}") from error
    return model.config, (rotary.inv_freq, rotary.attention_scaling)


def _rope(parameters: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    """Fields of a RopeConfig, and keys that none of them stands for."""
    given = {key: value for key, value in parameters.items() if value is not None}
    kind, base = given.pop("rope_type"), given.pop("rope_theta")
    given.pop("type", None)  # the older name of rope_type
    if kind not in _ROPE_KEYS:
        way_out = ""
        if kind == "dynamic":
            way_out = (
                "; its angles change with the length of the text: write default there, and stretch the run's positions "
                "by model.rope.scaling=ntk model.rope.factor=…"
            )
        raise ConfigError(f"{path} has rope_type={kind!r}; our model knows {', '.join(_ROPE_KEYS)}{way_out}")
    scaling, keys = _ROPE_KEYS[kind]
    values = {ours: given.pop(theirs) for ours, theirs in keys.items() if theirs in given}
    numbers = {name: int(value) if name == "original_context" else float(value) for name, value in values.items()}
    return {"base": float(base), "scaling": scaling, **numbers}, sorted(given)
