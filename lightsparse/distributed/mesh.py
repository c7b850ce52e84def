"""The ranks of a job as a grid, data × context, and the process groups along it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class RankGrid:
    """Rank r stands at (data r // context, context r % context).

    The context ranks of a sequence are neighbours, because they talk in every layer: on several machines a sequence
    stays on one where it fits.

    ranks    of the whole job
    context  ranks that hold one sequence together; divides `ranks`
    """

    ranks: int
    context: int = 1

    def __post_init__(self) -> None:
        if self.context < 1 or self.ranks % self.context:
            raise ValueError(f"a grid of {self.ranks} ranks has no rows of {self.context}; the row must divide them")

    @property
    def data(self) -> int:
        """Groups of ranks that read different samples."""
        return self.ranks // self.context

    def data_rank(self, rank: int) -> int:
        return rank // self.context

    def context_group(self, timeout: timedelta) -> dist.ProcessGroup:
        """The group of this rank's sequence, in ascending order; all ranks must call this.

        A group of its own and not a dimension of a DeviceMesh: those wait half an hour, whatever the job's timeout.
        """
        mine = None
        for first in range(0, self.ranks, self.context):
            members = list(range(first, first + self.context))
            group = dist.new_group(members, timeout=timeout)
            if dist.get_rank() in members:
                mine = group
        assert isinstance(mine, dist.ProcessGroup)  # the grid holds every rank
        return mine

    def flat_mesh(self, device_type: str) -> DeviceMesh:
        """All ranks in one dimension, on the default group: two dimensions would mean hybrid sharding to FSDP2."""
        return init_device_mesh(device_type, (self.ranks,), mesh_dim_names=("ranks",))
