"""What `lightsparse export` writes: the folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightsparse.attention.core import AttentionShape
from lightsparse.attention.dense import DenseAttention
from lightsparse.cli.work.model_card import is_dense, model_card
from lightsparse.config.build import AttentionChoice
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.training.checkpoints.load_run import TrainedRun, load_run
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.utils.text import count_text


def export(run: str, out: str, *, step: int | None, dtype: str | None, shard: str) -> list[str]:
    """Writes the folder; returns what to say about it, a line each. By the words of `lightsparse export`."""
    try:
        from lightsparse import hf
        from lightsparse.hf.register import ATTENTION_FILE, refusal
        from lightsparse.hf.tokenizer_files import save_tokenizer
    except ImportError as error:
        raise ConfigError(f"an export needs {error.name}; pip install 'lightsparse[hf]'") from error
    target = _new_folder(out)
    trained = load_run(run, step)
    config, model = trained.config, trained.model
    dtype = dtype or ("bfloat16" if config.precision == "bf16-true" else "float32")
    if config.objective != "causal":
        raise ConfigError(f"run is {run}, trained with objective={config.objective}; transformers' decoders are causal")
    bos = trained.tokenizer.bos
    architecture = hf.family_of(config.model).architecture
    theirs = hf.their_config(
        config.model,
        model.vocab_size,
        context=config.data.context,
        dtype=dtype,
        attention_dropout=config.attention.config.dropout,
        bos=bos,
        eos=bos,
    )
    left_out = [name for name, _ in model.named_parameters() if ".self_attn.core." in name]
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        hf.save_model(model, theirs, partial, dtype=getattr(torch, dtype), shard=shard)
        directory = RunDirectory(Path(run))
        tokenizer = save_tokenizer(partial, trained.tokenizer)
        reason = refusal(*_attention_of(trained)) or "" if "S" in config.model.layers else ""
        _write_attention(partial / ATTENTION_FILE, config)
        of = (trained, architecture, tokenizer or "AutoTokenizer")
        card = model_card(*of, summary=_summary(directory), without=reason, left_out=len(left_out))
        (partial / "README.md").write_text(card, encoding="utf-8")
        if target.is_dir():
            target.rmdir()  # empty, as was checked
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _said(target, trained, architecture, tokenizer, dtype, reason, left_out)


def _said(
    target: Path,
    trained: TrainedRun,
    architecture: str,
    tokenizer: str | None,
    dtype: str,
    reason: str,
    left_out: Sequence[str],
) -> list[str]:
    dense = is_dense(trained.config)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors")) / 2**20
    weights = sum(p.numel() for name, p in trained.model.named_parameters() if name not in left_out)
    lines = [
        f"{target}: {architecture} of step {trained.step}, {count_text(weights)} parameters in {dtype}, {size:.1f} MiB",
        *([] if dense else ["in transformers it reads everything before a token (dense attention)"]),
    ]
    if tokenizer is None:
        lines.append(f"without a tokenizer: {type(trained.tokenizer).__name__} has no files")
    elif tokenizer != "AutoTokenizer":
        lines.append(
            f"its tokenizer is for transformers.{tokenizer}.from_pretrained; AutoTokenizer reads texts by rules of its "
            f"own for {architecture}"
        )
    if dense:
        return lines
    if reason:
        lines.append(f"its own attention stays behind: {reason}")
    else:
        lines.append(
            f"with the attention of the run ({trained.config.attention.name}): "
            f'attn_implementation=lightsparse.hf.register_exported("{target}")'
        )
    if left_out:
        lines.append(f"{len(left_out)} parameters of that attention are not in the folder ({left_out[0]} …)")
    return lines


def _write_attention(path: Path, config: Config) -> None:
    """The run's node `attention`, from which `hf.register_exported` builds it. The dropout is in config.json."""
    attention, layers = config.composed["attention"], config.model.layer_pattern
    if "S" not in config.model.layers:  # what no layer uses needs no parameters
        attention = {"_target_": f"{DenseAttention.__module__}.{DenseAttention.__qualname__}"}
    stored = {"attention": attention | {"dropout": 0.0}, "context": config.data.context, "layer_pattern": layers}
    if config.model.local_window is not None:
        stored["local_window"] = config.model.local_window
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def _attention_of(trained: TrainedRun) -> tuple[AttentionChoice, AttentionShape]:
    """Choice and shape of the run's attention as transformers gets it: there, the dropout is the model's."""
    choice, widths = trained.config.attention, trained.config.model.widths
    shape = AttentionShape(
        widths.heads, widths.kv_heads, widths.head_dim, widths.embed_dim, context=trained.config.data.context
    )
    return replace(choice, config=replace(choice.config, dropout=0.0)), shape


def _summary(directory: RunDirectory) -> dict[str, Any]:
    """summary.json, or nothing for a run that has not finished."""
    if not directory.summary.is_file():
        return {}
    return json.loads(directory.summary.read_text(encoding="utf-8"))


def _new_folder(out: str) -> Path:
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"out is {out}, where something lies already; name a new folder")
    if not path.parent.is_dir():
        raise ConfigError(f"out is {out}, but there is no folder {path.parent}; make it first")
    return path
