"""README.md of an exported model: what was trained, how well, and how to get its attention back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightsparse.attention.dense import DenseConfig
from lightsparse.config.schema import Config
from lightsparse.training.checkpoints.load_run import TrainedRun
from lightsparse.utils.text import count_text


def model_card(
    run: TrainedRun, architecture: str, tokenizer: str, *, summary: Mapping[str, Any], without: str, left_out: int
) -> str:
    """The card as Markdown.

    architecture  the class of transformers
    tokenizer     likewise
    summary       of summary.json; what it does not hold is left out
    without       why transformers cannot have the run's attention; "" where it can
    left_out      parameters of that attention that the folder does not hold
    """
    config = run.config
    sparse = not is_dense(config)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lightsparse, sparse-attention]" if sparse else "tags: [lightsparse]",
        "---",
        "",
        f"# {config.name}",
        "",
        f"A {architecture.removesuffix('ForCausalLM')} trained with lightsparse, attention `{config.attention.name}`.",
        "",
        *_table(run, summary),
        "",
        "## Use",
        "",
        *_use(tokenizer, sparse, without, left_out),
    ]
    return "\n".join(lines) + "\n"


def is_dense(config: Config) -> bool:
    """Whether every layer reads everything before a token, as transformers does by itself."""
    attention, layers = config.attention.config, config.model.layers
    chosen_is_dense = isinstance(attention, DenseConfig) and attention.pattern is None
    return "L" not in layers and ("S" not in layers or chosen_is_dense)


def _table(run: TrainedRun, summary: Mapping[str, Any]) -> list[str]:
    config, model = run.config, run.model
    rows = {
        "parameters": count_text(sum(parameter.numel() for parameter in model.parameters())),
        "attention": f"{config.attention.name}, layers {config.model.layers}",
        "density": _number(summary.get("attention_density"), ".3f", " of dense attention"),
        "context": f"{config.data.context:,} tokens",
        "data": type(config.data).__name__,
        "started from": config.init_from and f"`{config.init_from}`",
        "steps": f"{run.step:,}",
        "training tokens": _number(summary.get("tokens"), ",", "") if summary.get("steps") == run.step else None,
    }
    if summary.get("steps") == run.step:  # of these weights
        rows |= {
            "validation": _number(summary.get("val_bits_per_byte"), ".4f", " bits per byte"),
            "validation loss": _number(summary.get("val_loss"), ".4f", " nats per token"),
            "perplexity": _number(summary.get("val_perplexity"), ".2f", ""),
        }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)]


def _use(tokenizer: str, sparse: bool, without: str, left_out: int) -> list[str]:
    plain = [
        "```python",
        f"from transformers import AutoModelForCausalLM, {tokenizer}",
        "",
        'folder = "."  # where these files are',
        f"tokenizer = {tokenizer}.from_pretrained(folder)",
    ]
    if not sparse:
        return [*plain, "model = AutoModelForCausalLM.from_pretrained(folder)", "```"]
    if without:
        more = f" {left_out} parameters of that attention are not in these files." if left_out else ""
        return [
            *plain,
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            "```",
            "",
            f"This reads everything before a token, which is not what the model was trained with: {without}.{more}",
        ]
    return [
        "With the attention it was trained with, as lightsparse.json describes it (`pip install 'lightsparse[hf]'`):",
        "",
        *plain,
        "",
        "from lightsparse import hf",
        "",
        "model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=hf.register_exported(folder))",
        "```",
        "",
        "Without `attn_implementation`, transformers reads everything before a token (dense attention).",
    ]


def _number(value: float | None, form: str, unit: str) -> str | None:
    return None if value is None else f"{value:{form}}{unit}"
