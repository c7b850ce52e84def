"""What a process can say about the ranks of a run: by its environment before it has met them, by the trainer then."""

from __future__ import annotations

import os
from typing import Any

# What torchrun, Lightning's launcher, SLURM and jsrun say about a process; Lightning by itself sets no RANK, and on
# every node but the first only NODE_RANK tells that the node's first process is not the run's.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the run, by its environment; a process that was not launched as a rank is."""
    return all(int(os.environ.get(name, 0)) == 0 for name in _RANKS)


def launched_ranks() -> tuple[int, int] | None:
    """(ranks on each machine, machines) where torchrun or SLURM has started the ranks; None where we shall."""
    if "WORLD_SIZE" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:  # by torchrun; ours sets the first alone
        ranks, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return here, ranks // here
    if "SLURM_NTASKS" in os.environ and _of_srun():
        machines = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ["SLURM_NTASKS"]) // machines, machines
    return None


def _of_srun() -> bool:
    """Whether SLURM has started this process as one of its tasks, and not the shell that it runs in."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment  # takes seconds, and only SLURM needs it

    return SLURMEnvironment.detect()


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, on rank 0; of no use on the others. All ranks must call this."""
    import torch.distributed as dist  # the rest of this module answers before torch is loaded

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or []
