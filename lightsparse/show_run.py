"""What a trained run reads: its newest checkpoint on the first validation sample, for `lightsparse.show run=…`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from lightsparse.analysis.tile_map import TileMap, of_core
from lightsparse.attention.core import AttentionCore
from lightsparse.config import Config, parse
from lightsparse.data.module import DataModule
from lightsparse.targets import ConfigError
from lightsparse.training.checkpoint_files import newest_checkpoint, read_checkpoint
from lightsparse.training.directory import RunDirectory
from lightsparse.training.module import language_model


def of_run(path: Path, layer: str | None) -> tuple[str, TileMap]:
    """A name for what was drawn, and the map of one layer; on the CPU, without noise and dropout.

    layer  a number from 0; None = the first layer with the chosen attention, or 0
    Raises ConfigError for a folder that holds no run or no checkpoint, and a layer that the model does not have;
    DataError where the run's text is gone.
    """
    directory = RunDirectory(path)
    if not directory.config.is_file():
        raise ConfigError(f"run is {path}, where there is no config.yaml; name a run directory such as runs/<name>")
    stored = OmegaConf.to_container(OmegaConf.load(directory.config))
    assert isinstance(stored, dict)  # as the run wrote it
    config = parse({str(key): value for key, value in stored.items()})
    number = _layer(config, layer)
    newest = newest_checkpoint(directory.checkpoints)
    if newest is None:
        raise ConfigError(f"run is {path}, which holds no checkpoint; train it to checkpoint.every_n_steps first")
    step, file = newest
    data = DataModule(config.data, config.seed, config.eval.tokens)
    data.setup()
    module = language_model(config, data.tokenizer)
    module.load_state_dict(read_checkpoint(file)["state_dict"])
    module.eval()
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
    name = f"{config.attention.name if config.model.layers[number] == 'S' else 'dense'} · layer {number} · step {step}"
    return name, of_core(core, seen["k"].shape[2], seen["ctx"], (seen["q"], seen["k"], seen["x"]))


def _layer(config: Config, given: str | None) -> int:
    layers = config.model.layers
    if given is None:
        return max(layers.find("S"), 0)
    if not given.isdecimal() or int(given) >= len(layers):
        raise ConfigError(f"layer is {given}; the run's model has layers 0 … {len(layers) - 1}")
    return int(given)
