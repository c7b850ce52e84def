"""What a trained run reads: its newest checkpoint on the first validation sample, for `lightsparse.cli.show run=…`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightsparse.analysis.tile_map import TileMap, of_core
from lightsparse.attention.core import AttentionCore
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data.module import DataModule
from lightsparse.training.checkpoints.load_run import load_run, stored_config
from lightsparse.training.module import LanguageModel


def of_run(path: Path, layer: str | None) -> tuple[str, TileMap]:
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


def _layer(config: Config, given: str | None) -> int:
    layers = config.model.layers
    if given is None:
        return max(layers.find("S"), 0)
    if not given.isdecimal() or int(given) >= len(layers):
        raise ConfigError(f"layer is {given}; the run's model has layers 0 … {len(layers) - 1}")
    return int(given)
