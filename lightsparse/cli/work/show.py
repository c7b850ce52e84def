"""What `lightsparse show` draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightsparse.analysis import pattern_picture
from lightsparse.analysis.tile_map import MAX_PANELS, Chooser, TileMap, of_core
from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.config.parse import on_this_machine, parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data.module import DataModule
from lightsparse.training.checkpoints.load_run import load_run, stored_config
from lightsparse.training.module import LanguageModel
from lightsparse.utils.atomic_files import writable

UNTRAINED = "untrained, random input"


def draw(raw: Mapping[str, Any], out: Path) -> list[str]:
    """The picture of a composed config's variant; returns what to say about it, a line each, as all here."""
    writable(out.parent)
    config = parse(on_this_machine(raw))
    drawn, remark = untrained(config)
    return _saved(drawn, f"{config.attention.name} ({remark})" if remark else config.attention.name, out)


def draw_run(run: Path, layer: int | None, out: Path) -> list[str]:
    """The picture of what a run directory's newest checkpoint reads."""
    writable(out.parent)
    name, drawn = of_run(run, layer)
    return _saved(drawn, name, out)


def draw_all(raws: Mapping[str, Mapping[str, Any]], out: Path) -> list[str]:
    """The gallery, densest first; a variant that cannot do what its config asks is left out and named."""
    writable(out.parent)
    drawn: dict[str, tuple[TileMap, str]] = {}
    left_out: dict[str, ConfigError] = {}
    for name, raw in raws.items():
        config = parse(on_this_machine(raw))
        try:
            drawn[name] = untrained(config, limit=1)
        except ConfigError as error:
            left_out[name] = error
    if not drawn:
        raise next(iter(left_out.values()))
    by_density = dict(sorted(drawn.items(), key=lambda item: -item[1][0].density))
    pattern_picture.save_gallery(by_density, out)
    lines = [f"{out}: " + ", ".join(f"{name} {each.density:.3g}" for name, (each, _) in by_density.items())]
    return lines + [f"{name} is left out: {error}" for name, error in left_out.items()]


def of_run(path: Path, layer: int | None) -> tuple[str, TileMap]:
    """A name for what was drawn, and the map of one layer; on the CPU, without noise and dropout.

    layer  a number from 0; None = the first layer with the chosen attention, or 0
    Raises ConfigError for a folder that holds no run or no checkpoint, and a layer that the model does not have;
    DataError where the run's text is gone.
    """
    number = _layer(stored_config(path), layer)
    run = load_run(path)
    config = run.config
    data = DataModule(config.data.with_tokenizer(run.tokenizer), config.seed, config.eval.tokens)
    data.setup()
    module = LanguageModel(
        run.model, config, token_bytes=run.tokenizer.token_bytes(), mask_id=run.tokenizer.mask
    ).eval()
    core = module.model.layers[number].self_attn.core  # type: ignore[union-attr]
    assert isinstance(core, AttentionCore)
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(zip(("q", "k", "v"), args, strict=True), **kwargs)

    core.register_forward_pre_hook(keep, with_kwargs=True)
    batch = {key: value[:1] for key, value in next(iter(data.val_dataloader())).items()}
    with torch.no_grad():
        module.on_validation_epoch_start()
        module.validation_step(batch, 0)
    name = (
        f"{config.attention.name if config.model.layers[number] == 'S' else 'dense'} · layer {number} · step {run.step}"
    )
    return name, of_core(core, seen["k"].shape[2], seen["ctx"], (seen["q"], seen["k"], seen["x"]))


def _layer(config: Config, given: int | None) -> int:
    layers = config.model.layers
    if given is None:
        return max(layers.find("S"), 0)
    if not 0 <= given < len(layers):
        raise ConfigError(f"layer is {given}; the run's model has layers 0 … {len(layers) - 1}")
    return given


def untrained(config: Config, limit: int = MAX_PANELS) -> tuple[TileMap, str]:
    """What one layer reads in one document of data.context tokens, and a remark where that depends on the input.

    Raises ConfigError when the variant cannot reach what is asked (a density, say) or has nothing to draw.
    """
    embed_dim, heads, kv_heads, head_dim, _ = config.model.widths
    context, causal = config.data.context, config.objective == "causal"
    shape = AttentionShape(heads, kv_heads, head_dim, embed_dim, causal=causal, context=context)
    torch.manual_seed(config.seed)
    core: AttentionCore = config.attention.build(shape)
    ctx = SequenceContext(positions=torch.arange(context)[None])
    try:
        return of_core(core, context, ctx, limit=limit), UNTRAINED if isinstance(core, Chooser) else ""
    except ConfigError:
        raise
    except NotImplementedError as error:
        raise ConfigError(f"attention is {config.attention.name}, which cannot be drawn: {error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _saved(drawn: TileMap, name: str, out: Path) -> list[str]:
    pattern_picture.save(drawn, out, name)
    return [f"{out}: {name}, density {drawn.density:.4g}"]
