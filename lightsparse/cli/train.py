"""The command `python train.py …` or `lightsparse train …`: compose → parse and check → build and fit.

What ends a run without being an error of the program is one sentence on stderr, with an exit code of its own: 2 where
something has to be changed, 75 where the same command resumes the run (training/endings.py has them all). With `-m`,
sweepers minimise what `train` returns, each trial is a program of its own, and code 1 says that trials have failed
(sweep/launcher.py); with doctor=true nothing is trained (preflight/doctor.py), and code 2 says that something is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hydra
from omegaconf import DictConfig

from lightsparse.config.compose import HYDRA_VERSION, conf_dir, plain
from lightsparse.config.parse import explain, on_this_machine, parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.environment import is_first_rank, launched_ranks
from lightsparse.sweep.launcher import ending, register_launcher
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
from lightsparse.utils.compat.hydra import is_from_hydra, is_sweep


@hydra.main(version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name="config")
def train(composed: DictConfig) -> float:
    """One run; returns what sweepers minimise: bits per byte, or the share of wrong answers where the data asks."""
    with refusals_as_one_sentence():
        config = parse(on_this_machine(plain(composed)))
        _refuse_ranks_inside_a_sweep(config)
        if config.doctor:
            return examine(config)
        check_memory(config)
        check(config)
        needed = estimate(config)
        if is_first_rank():
            warn_of_memory(config, needed)
        keep_freed_where_there_is_room(config, needed)
        with memory_named(config, needed):
            return sweep_metric(fit(config))


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightsparse").setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing them in its own way
    leave_when_asked()
    register_launcher()
    with refusals_as_one_sentence():
        train()
    code, sentence = ending()
    if code:
        sys.stderr.write(f"{sentence}\n")
        sys.exit(code)


def _refuse_ranks_inside_a_sweep(config: Config) -> None:
    """Lightning starts ranks as this command line once more: each would run the whole sweep."""
    if is_sweep() and config.ranks > 1 and launched_ranks() is None:
        raise ConfigError(
            f"the trial has {config.ranks} ranks (trainer.devices × trainer.num_nodes) and runs inside the sweep's "
            "process; use hydra/launcher=trials (the default), which starts each trial as a program of its own"
        )


@contextmanager
def refusals_as_one_sentence() -> Iterator[None]:
    """`in_one_sentence`, and the same for what Hydra refuses while it composes."""
    with in_one_sentence():
        try:
            yield
        except Exception as error:
            if not is_from_hydra(error):
                raise
            words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
            raise ConfigError(explain(error, words)) from error


if __name__ == "__main__":
    main()
