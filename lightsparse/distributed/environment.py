"""What a process can say about the ranks of a run: by its launcher before it has met them, by the trainer then.

Which rank a process is, only a launcher says: a rank variable without the others that its launcher sets is left over
from a shell, or belongs to somebody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from lightsparse.utils.refusal import Refusal

if TYPE_CHECKING:
    from lightning.pytorch.plugins.environments import ClusterEnvironment

OWN = "LIGHTSPARSE_LAUNCHER"  # set by ours for the ranks that a first rank starts: its process id

# ours      the first rank on a machine has started the others of it (launcher.py)
# by hand   a user starts this command on each machine, and says which one it is
Launcher = Literal["ours", "torchrun", "SLURM", "jsrun", "by hand"]

_RANK: dict[Launcher | None, tuple[str, ...]] = {  # launcher → the variables that are all 0 on the first rank only
    "ours": ("NODE_RANK", "LOCAL_RANK"),
    "torchrun": ("RANK",),
    "SLURM": ("SLURM_PROCID",),
    "jsrun": ("JSM_NAMESPACE_RANK",),
    "by hand": ("NODE_RANK",),
    None: (),
}
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_SCHEDULERS = ("SLURM_PROCID", "JSM_NAMESPACE_RANK")  # in every process of a job, also where no rank was launched


def launcher() -> Launcher | None:
    """Who has started this process as one of several ranks; None where nobody has."""
    if _are_numbers(OWN, "NODE_RANK", "LOCAL_RANK"):
        return "ours"
    if _are_numbers("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") and _number("RANK") < _number("WORLD_SIZE"):
        return "torchrun"
    # A single task of SLURM is no rank of several, nor is a job's script: ours starts the ranks there, as in a shell.
    if in_slurm_job() and _are_numbers("SLURM_NTASKS") and _number("SLURM_PROCID") < _number("SLURM_NTASKS") > 1:
        is_script = "SLURM_TASK_PID" in os.environ and "SLURM_STEP_ID" not in os.environ  # srun sets both
        if not is_script:
            return "SLURM"
    if (
        _are_numbers("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK")
        and "LSB_DJOB_RANKFILE" in os.environ
    ):
        return "jsrun"
    if _are_numbers("NODE_RANK", "MASTER_PORT") and os.environ.get("MASTER_ADDR"):
        return "by hand"
    return None


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the run, by its launcher; a process that was not launched as a rank is."""
    return all(_number(name) == 0 for name in _RANK[launcher()])


def launched_ranks() -> tuple[int, int] | None:
    """(ranks on each machine, machines) where torchrun or SLURM has started the ranks; None where we shall.

    Raises Refusal where SLURM has not started the same number on each machine.
    """
    if launcher() == "torchrun":
        here = _number("LOCAL_WORLD_SIZE")
        return here, _number("WORLD_SIZE") // here
    if launcher() != "SLURM":
        return None
    tasks, machines = _number("SLURM_NTASKS"), int(os.environ.get("SLURM_NNODES", 1))
    if tasks % machines:
        raise Refusal(
            f"SLURM has started {tasks} tasks on {machines} machines (SLURM_NTASKS, SLURM_NNODES), not the same number "
            "on each; use srun --nodes=<machines> --ntasks-per-node=<ranks>"
        )
    return tasks // machines, machines


def in_slurm_job() -> bool:
    """Whether a job of SLURM has started this process; not a shell of one, in which somebody types."""
    return _are_numbers("SLURM_PROCID") and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def ignore_stray_ranks() -> Iterator[str]:
    """Remove the rank variables that this process's launcher has not set; a sentence for each.

    Lightning believes them: a process with RANK=1 would write no metrics, one with LOCAL_RANK=0 start no other rank,
    and one with somebody's MASTER_ADDR look for its own there.
    """
    found = launcher()
    own = _RANKS if found == "torchrun" else _RANK[found]  # torchrun itself may be a task of another launcher
    for name in (*_RANKS, *(("MASTER_ADDR", "MASTER_PORT") if found is None else ())):
        value = os.environ.get(name)
        if value is None or name in own or (name in _SCHEDULERS and value == "0"):
            continue
        del os.environ[name]
        yield f"{name}={value} is ignored: no launcher of ranks (torchrun, srun, …) has set it"


def check_machines(machines: int) -> None:
    """Raises Refusal where ranks on several machines could not find each other, or this machine is not one of them."""
    found = launcher()
    if found is None and machines > 1:
        raise Refusal(
            f"trainer.num_nodes is {machines}, and nothing tells this process which machine it is on; start it with "
            "torchrun or srun, or on each machine with NODE_RANK, MASTER_ADDR and MASTER_PORT set"
        )
    if found == "by hand" and _number("NODE_RANK") >= machines:
        raise Refusal(
            f"NODE_RANK is {_number('NODE_RANK')} and trainer.num_nodes is {machines}; unset NODE_RANK, or set "
            "trainer.num_nodes to the number of machines"
        )


def cluster_environment() -> ClusterEnvironment:
    """What Lightning asks about the ranks: of the launcher that we have recognised, whatever else it would find."""
    from lightning.pytorch.plugins.environments import (  # takes seconds
        LightningEnvironment,
        LSFEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )

    found, ranks_here = launcher(), launched_ranks()
    if found == "SLURM" and ranks_here is not None:
        os.environ["SLURM_NTASKS_PER_NODE"] = str(ranks_here[0])  # Lightning needs it, and srun need not set it
    kinds = {"torchrun": TorchElasticEnvironment, "SLURM": SLURMEnvironment, "jsrun": LSFEnvironment}
    if found in kinds:
        return kinds[found]()
    ranks = LightningEnvironment()
    if found is None:
        ranks.set_global_rank(0)  # for Lightning's functions that the first rank alone runs
    return ranks


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, on rank 0; of no use on the others. All ranks must call this."""
    import torch.distributed as dist  # the rest of this module answers before torch is loaded

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or []


def _are_numbers(*names: str) -> bool:
    return all(os.environ.get(name, "").isdecimal() for name in names)


def _number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name, default))
