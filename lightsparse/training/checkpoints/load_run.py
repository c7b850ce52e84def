"""A trained run opened again: its config, its model with the weights of a checkpoint, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightsparse.config.parse import parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data import Tokenizer
from lightsparse.data.run_tokenizer import tokenizer_of
from lightsparse.models.transformer import Transformer
from lightsparse.training.checkpoints.files import checkpoint_steps, damage_of, newest_checkpoint, read_checkpoint
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.module import language_model


@dataclass(frozen=True)
class TrainedRun:
    config: Config
    model: Transformer  # in evaluation mode, fp32, on the CPU
    tokenizer: Tokenizer
    step: int  # optimizer steps behind the weights


def load_run(directory: Path | str, step: int | None = None) -> TrainedRun:
    """The run of a directory such as runs/<name>, at its newest whole checkpoint or at that of one step.

    Nothing of its data is read. Raises ConfigError for a folder that holds no run, no checkpoint or none of that step,
    and where that one is damaged.
    """
    config = stored_config(directory)
    saved, file = _checkpoint(RunDirectory(Path(directory)), step)
    tokenizer = tokenizer_of(config.data, Path(directory))
    module = language_model(config, tokenizer)
    module.load_state_dict(read_checkpoint(file)["state_dict"])
    module.model.set_step(max(saved - 1, 0), config.trainer.max_steps)  # as the last step of training left it
    return TrainedRun(config, module.model.eval(), tokenizer, saved)


def stored_config(directory: Path | str) -> Config:
    """The config that a run was started with. Raises ConfigError for a folder without a sound config.yaml."""
    run = RunDirectory(Path(directory))
    if not run.config.is_file():
        raise ConfigError(
            f"run is {directory}, where there is no config.yaml; name a run directory such as runs/<name>"
        )
    return parse(run.stored)


def _checkpoint(directory: RunDirectory, step: int | None) -> tuple[int, Path]:
    """Step and file of the newest whole checkpoint, or of the one asked for."""
    if step is None:
        newest = newest_checkpoint(directory.checkpoints)
        if newest is None:
            raise ConfigError(
                f"run is {directory.path}, which holds no whole checkpoint; train it to checkpoint.every_n_steps first"
            )
        return newest
    steps = checkpoint_steps(directory.checkpoints)
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"step is {step}; {directory.path} has checkpoints of steps {known}, or leave step out")
    damage = damage_of(steps[step])
    if damage is not None:
        raise ConfigError(f"step is {step}, but {steps[step]} is damaged ({damage}); choose another step")
    return step, steps[step]
