"""All ranks of a job train the same config, or none trains.

Ranks are started by hand on several machines, or by a launcher that composes overrides on each: one that reads
another seed or step count would train another model, or wait for the others forever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lightsparse.config.targets import ConfigError

_OWN = ("threads", "runs_dir")  # what may differ between machines


class SameConfig(Callback):
    """Compares the composed configs, and the step from which each rank resumes, once the ranks have met.

    Raises ConfigError on every rank where they differ.
    """

    def __init__(self, composed: Mapping[str, Any], start: int) -> None:
        self.values = {key: value for key, value in _flat(composed).items() if key not in _OWN}
        self.values["newest whole checkpoint"] = start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        of_ranks: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(of_ranks, self.values)
        for rank, values in enumerate(of_ranks):
            other = [key for key in of_ranks[0] | values if of_ranks[0].get(key) != values.get(key)]
            if other:
                key = other[0]
                raise ConfigError(
                    f"rank {rank} has {key}={values.get(key)} and rank 0 has {key}={of_ranks[0].get(key)}; start all "
                    "ranks of a job with the same command"
                )


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.items():
        values |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values
