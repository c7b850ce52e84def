"""Lightning (2.6): private names and layouts that we touch, and its warnings that we keep off the screen."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher

# What a trainer asks of a strategy's `launcher`: launch, kill, is_interactive_compatible. No public class says so, and
# Lightning's own launchers make up a rank's command line from what is left of sys.argv.
Launcher = _Launcher

LOGGERS = ("lightning.pytorch", "lightning.fabric")  # they tell of every start; nothing documented turns that off

# Said at every run, whatever it does right. Lightning's classes of warnings hold the useful ones, too.
TIPS = (
    r".*does not have many workers which may be a bottleneck.*",  # data.num_workers is the user's choice
    r".*dataloader is not resumable.*",  # it is: its order is a function of `consumed`
    r".*GPU available but not used.*",
    r".*Experiment logs directory .* exists and is not empty.*",  # resume
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning's own use of torch
    r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*",
)


def join_ranks(strategy: ModelParallelStrategy) -> None:
    """Have the strategy meet the other ranks. `setup_environment` does, and builds a mesh in two dimensions: those mean
    hybrid sharding to FSDP2, and wait for half an hour whatever the timeout."""
    strategy._setup_distributed()


def validate_now(trainer: Trainer) -> None:
    """A whole validation between fit's loop and its end, with all hooks: `trainer.validate` would set up ranks anew."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def batch_counts(checkpoint: dict[str, Any]) -> list[dict[str, int]]:
    """The counts of micro-batches in a checkpoint, of the run and of the epoch; to be changed in place.

    Each has ready, started, processed, completed. They are written by loops whose state no hook sees.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return [progress["total"], progress["current"]]


def datamodule_state(checkpoint: dict[str, Any], data: LightningDataModule) -> dict[str, Any]:
    """What the data module put into a checkpoint. Its place is documented for hooks only, which come too late: this is
    looked at before a run may touch its directory."""
    return checkpoint[type(data).__qualname__]
