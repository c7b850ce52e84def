"""Which process is the first of a run, known before any of them has met the others."""

from __future__ import annotations

import os

# What torchrun, Lightning's launcher, SLURM and jsrun say about a process; Lightning by itself sets no RANK, and on
# every node but the first only NODE_RANK tells that the node's first process is not the run's.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the run, by its environment; a process that was not launched as a rank is."""
    return all(int(os.environ.get(name, 0)) == 0 for name in _RANKS)
