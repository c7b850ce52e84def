"""All ranks of a job train the same config into the same folder, or none trains and nothing is written.

Ranks that torchrun, SLURM or a user has started compose their config each: one that reads another seed or step count
would train another model, or wait for the others forever; one in another folder would write its shards there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.environment import is_first_rank
from lightsparse.training.checkpoints.run_directory import RunDirectory

_OWN = ("threads", "runs_dir")  # may be given in another way on each machine; the run directory below may not


def values_to_agree_on(config: Config, directory: RunDirectory, start: int, fingerprint: str) -> dict[str, Any]:
    """What must be the same on every rank, by its name: the composed config, and what it has come to mean here."""
    values = {key: value for key, value in _flat(config.composed).items() if key not in _OWN}
    found = {"run directory": str(Path(directory.path).absolute()), "newest whole checkpoint": start}
    return values | found | {"fingerprint of the data": fingerprint}


def begin_together(
    values: Mapping[str, Any],
    prepare: Callable[[], None],
    writes_on_all: Path | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Once the ranks have met, on every rank: compare the values, then let the first rank prepare the run directory.

    writes_on_all  a file that the first rank has then, where every rank writes beside it
    Raises ConfigError on every rank where values differ, where `prepare` does, or where a rank does not see the file.
    """
    if is_first_rank() != (dist.get_rank() == 0):
        raise ConfigError(
            f"this process's variables and Lightning do not agree on whether it is the first rank (it has rank "
            f"{dist.get_rank()} of {dist.get_world_size()}); start the ranks with trainer.devices, torchrun or srun"
        )
    _compare(_gathered(values, group))
    refused: list[Any] = [None]
    if is_first_rank():
        try:
            prepare()
        except ConfigError as error:
            refused = [str(error)]
    dist.broadcast_object_list(refused, src=0, group=group)
    if refused[0] is not None:
        raise ConfigError(refused[0])
    if writes_on_all is None:
        return
    content = _gathered(writes_on_all.read_bytes() if writes_on_all.exists() else None, group)
    for rank, seen in enumerate(content):
        if seen != content[0]:
            raise ConfigError(
                f"rank {rank} does not see {writes_on_all}, which rank 0 has written, and each rank writes its part of "
                "a checkpoint there; set runs_dir to a folder that all machines share"
            )


def _compare(of_ranks: list[dict[str, Any]]) -> None:
    for rank, values in enumerate(of_ranks):
        other = [key for key in of_ranks[0] | values if of_ranks[0].get(key) != values.get(key)]
        if other:
            key = other[0]
            raise ConfigError(
                f"rank {rank} has {key}={values.get(key)} and rank 0 has {key}={of_ranks[0].get(key)}; start all "
                "ranks of a job with the same command in the same folder, without values that each rank finds for "
                "itself, such as ${now:%H}"
            )


def _gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, value, group=group)
    return of_ranks


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.items():
        values |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values
