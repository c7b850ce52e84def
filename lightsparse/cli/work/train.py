"""One run from its composed config: parse → check → estimate → fit; with doctor=true a look at what it would meet.

What ends a run without being an error of the program is one sentence on stderr, with an exit code of its own: 2 where
something has to be changed, 75 where the same command resumes the run (training/endings.py has them all).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightsparse.config.parse import on_this_machine, parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.environment import check_machines, is_first_rank, launched_ranks
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
from lightsparse.utils.compat.hydra import is_sweep


def run(composed: Mapping[str, Any]) -> float:
    """What sweepers minimise: bits per byte, or the share of wrong answers where the data asks."""
    leave_when_asked()
    with in_one_sentence():
        config = parse(on_this_machine(composed))
        _refuse_ranks_inside_a_sweep(config)
        if config.doctor:
            return examine(config)
        check_machines(config.trainer.num_nodes)
        check_memory(config)
        check(config)
        needed = estimate(config)
        if is_first_rank():
            warn_of_memory(config, needed)
        keep_freed_where_there_is_room(config, needed)
        with memory_named(config, needed):
            return sweep_metric(fit(config))


def _refuse_ranks_inside_a_sweep(config: Config) -> None:
    """Lightning starts ranks as this command line once more: each would run the whole sweep."""
    if is_sweep() and config.ranks > 1 and launched_ranks() is None:
        raise ConfigError(
            f"the trial has {config.ranks} ranks (trainer.devices × trainer.num_nodes) and runs inside the sweep's "
            "process; use hydra/launcher=trials (the default), which starts each trial as a program of its own"
        )
