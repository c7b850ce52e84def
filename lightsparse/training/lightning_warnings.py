"""Keep Lightning's tips off the screen, by name, so that the few lines of ours are read and real warnings are seen."""

from __future__ import annotations

import logging
import warnings

_TIPS = (
    r".*does not have many workers which may be a bottleneck.*",  # data.num_workers is the user's choice
    r".*dataloader is not resumable.*",  # it is: its order is a function of `consumed`
    r".*GPU available but not used.*",
    r".*Experiment logs directory .* exists and is not empty.*",  # resume
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*you are using a .* with a `weights_only`.*",
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning's own use of torch
    r"FSDP2-wrapped module .* returned a view tensor.*",  # nothing of ours writes into a layer's output
    r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*",
)


def quiet_lightning() -> None:
    """Lightning reports warnings and errors only, and the known tips not at all."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _TIPS:
        warnings.filterwarnings("ignore", message=message)
