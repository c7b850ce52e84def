"""Weights of transformers' Llama, Mistral, Qwen2 and Qwen3 into our model and out of it, by name, bit for bit.

Our parameters bear their names, so nothing is split, joined or transposed. Files are safetensors, one or several with
an index; pickled weights are not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from lightsparse.attention.core import AttentionCore, AttentionShape
from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.config.targets import ConfigError
from lightsparse.hf.families import described
from lightsparse.models.transformer import Transformer
from lightsparse.utils.text import first_line

WHOLE, INDEX, HEAD = "model.safetensors", "model.safetensors.index.json", "lm_head.weight"
_OF_CORE = ".self_attn.core."  # in the names of what an attention of ours has trained for itself


def dense_core(shape: AttentionShape) -> AttentionCore:
    return DenseAttention(DenseConfig(), shape)


def load_model(
    folder: str | Path,
    build_core: Callable[[AttentionShape], AttentionCore] = dense_core,
    *,
    context: int | None = None,
) -> Transformer:
    """Our model with the form and the weights of a folder written by `save_pretrained`, in fp32, in training mode.

    build_core, context  as for Transformer
    Raises ConfigError for what our model cannot represent.
    """
    there = described(folder)
    model = Transformer(there.model, build_core, vocab_size=there.vocab_size, context=context)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: Transformer, folder: str | Path) -> list[str]:
    """Copies a folder's weights into a model of their form, whatever the dtype of either.

    Returns the names of the parameters that the folder cannot hold, an attention's own, which stay as they are. Raises
    ConfigError, with the model untouched, for files that are missing, lack a weight, have one more, or another shape.
    """
    wanted = {their_name(name): parameter for name, parameter in model.named_parameters() if _OF_CORE not in name}
    held = _held(Path(folder))
    if model.lm_head is None and HEAD in held:
        if not torch.equal(_tensor(held, HEAD), _tensor(held, their_name("embed_tokens.weight"))):
            raise ConfigError(
                f"{folder} has tie_word_embeddings=true and an {HEAD} that is no embedding; set it to false"
            )
        del held[HEAD]
    for names, says in (([n for n in wanted if n not in held], "lacks"), ([n for n in held if n not in wanted], "has")):
        if names:
            more = f" and {len(names) - 1} more weights" if len(names) > 1 else ""
            raise ConfigError(
                f"{folder} {says} {names[0]}{more}, unlike a model of its config.json; is the download complete?"
            )
    for name, parameter in wanted.items():
        with safe_open(held[name], framework="pt") as file:
            found = file.get_slice(name)
            shape, dtype = tuple(found.get_shape()), found.get_dtype()
        if shape != tuple(parameter.shape):
            raise ConfigError(f"{held[name]} has {name} of shape {shape}; here it is {tuple(parameter.shape)}")
        if dtype not in ("F64", "F32", "BF16", "F16"):
            raise ConfigError(
                f"{held[name]} has {name} in {dtype}; quantised weights cannot be trained, use the originals"
            )
    for name, parameter in wanted.items():
        parameter.copy_(_tensor(held, name))
    return [name for name, _ in model.named_parameters() if _OF_CORE in name]


def save_model(
    model: Transformer, config: PreTrainedConfig, folder: str | Path, *, dtype: torch.dtype, shard: str = "5GB"
) -> None:
    """Writes config.json and the weights for `from_pretrained`, without what attentions trained for themselves.

    config  of `families.their_config`
    shard   most that one file holds; several files get an index
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    state = {their_name(n): p.detach().to("cpu", dtype) for n, p in model.named_parameters() if _OF_CORE not in n}
    save_torch_state_dict(state, str(folder), max_shard_size=shard, metadata={"format": "pt"})


def their_name(name: str) -> str:
    """The name in transformers of a parameter of Transformer."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _held(folder: Path) -> dict[str, Path]:
    """Name of each weight → its file, by transformers' order of precedence: the file or index that config.json names,
    the whole file, the shards of the index; of a name in two shards the later one."""
    try:
        return {name: path for path in _files(folder) for name in _names(path)}
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{folder} has weights that cannot be read: {first_line(error)}") from error


def _files(folder: Path) -> list[Path]:
    named = json.loads((folder / "config.json").read_bytes()).get("transformers_weights")
    there = (name for name in (WHOLE, INDEX) if (folder / name).is_file())
    first = named or next(there, WHOLE)
    files = [first]
    if first.endswith(".index.json"):
        files = sorted(set(json.loads((folder / first).read_bytes())["weight_map"].values()))
    for name in files:
        if Path(name).name != name:
            raise ConfigError(f"{folder} names {name} among its weights; a model lies in one folder")
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} lacks {name}; weights are read from safetensors, as save_pretrained writes")
    return [folder / name for name in files]


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        # Of old versions of transformers: the frequencies follow from config.json.
        return [name for name in file.keys() if not name.endswith(".rotary_emb.inv_freq")]  # noqa: SIM118


def _tensor(held: dict[str, Path], name: str) -> Tensor:
    with safe_open(held[name], framework="pt") as file:
        return file.get_tensor(name)
