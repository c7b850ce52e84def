"""One run from its composed config: parse → check → estimate → fit; with doctor=true a look at what it would meet.

What the run cannot do with is one sentence on stderr. Exit code 2: a wrong config, unusable data, a loss that is no
number, too little memory, a problem that the doctor found. Exit code 75: the same command continues the run, which was
stopped by a signal and has saved its step, or whose disk is full, or which has lost another rank of its job (all codes:
utils/rank_errors.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from lightsparse.config.parse import on_this_machine, parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.environment import is_first_rank, launched_ranks
from lightsparse.training.checkpoints.files import checkpoint_steps
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.endings import in_one_sentence
from lightsparse.training.metrics.summary import sweep_metric
from lightsparse.training.preemption import leave_when_asked
from lightsparse.training.preflight.check import check
from lightsparse.training.preflight.doctor import examine
from lightsparse.training.preflight.estimate import estimate
from lightsparse.training.preflight.out_of_memory import (
    check_memory,
    keep_freed_where_there_is_room,
    memory_named,
    warn_of_memory,
)
from lightsparse.training.run import fit
from lightsparse.utils.atomic_files import DiskFullError, disk_named


def run(composed: Mapping[str, Any]) -> float:
    """What sweepers minimise: bits per byte, or the share of wrong answers where the data asks."""
    leave_when_asked()
    with in_one_sentence():
        raw = on_this_machine(composed)
        config = parse(raw)
        _refuse_ranks_inside_a_sweep(config)
        if config.doctor:
            return examine(config, raw)
        check_memory(config)
        check(config)
        needed = estimate(config)
        if is_first_rank():
            warn_of_memory(config, needed)
        keep_freed_where_there_is_room(config, needed)
        with memory_named(config, needed), _disk_named(config):
            return sweep_metric(fit(config, raw))


def _refuse_ranks_inside_a_sweep(config: Config) -> None:
    """Lightning starts ranks as this command line once more: each would run the whole sweep."""
    inside = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if inside and config.ranks > 1 and launched_ranks() is None:
        raise ConfigError(
            f"the trial has {config.ranks} ranks (trainer.devices × trainer.num_nodes) and runs inside the sweep's "
            "process; use hydra/launcher=trials (the default), which starts a torchrun for each trial"
        )


@contextmanager
def _disk_named(config: Config) -> Iterator[None]:
    """Say of a full disk from where the run goes on once there is space."""
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    try:
        with disk_named(directory.path):
            yield
    except DiskFullError as error:
        step = max(checkpoint_steps(directory.checkpoints), default=0)
        raise DiskFullError(
            f"{error}; free some or lower checkpoint.keep, and the same command continues from step {step}"
        ) from error
