"""The command `python train.py …` or `lightsparse train …`: compose → parse and check → build and fit.

What the run cannot do with is one sentence on stderr. Exit code 2: a wrong config, unusable data, a loss that is no
number, too little memory. Exit code 75: the same command continues the run, which was stopped by a signal and has saved
its step, or whose disk is full, or which has lost another rank of its job (all codes: parallel/errors.py). With `-m`,
sweepers minimise what `train` returns, each trial is a program of its own, and code 1 says that trials have failed
(sweep/launcher.py); with doctor=true nothing is trained (doctor.py), and exit code 2 says that something is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from omegaconf import DictConfig

from lightsparse.config.compose import HYDRA_VERSION, conf_dir, plain
from lightsparse.config.parse import explain, on_this_machine, parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data import DataError
from lightsparse.distributed.environment import is_first_rank, launched_ranks
from lightsparse.sweep.launcher import ending, register_launcher
from lightsparse.training.checkpoints.background_writer import CheckpointLateError, is_writing
from lightsparse.training.checkpoints.files import checkpoint_steps
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.health import NonFiniteError
from lightsparse.training.metrics.summary import objective
from lightsparse.training.preemption import leave_when_asked
from lightsparse.training.preflight.check import check
from lightsparse.training.preflight.doctor import examine
from lightsparse.training.preflight.estimate import estimate
from lightsparse.training.preflight.out_of_memory import (
    MemoryShortError,
    check_memory,
    keep_freed_where_there_is_room,
    memory_named,
    warn_of_memory,
)
from lightsparse.training.run import fit
from lightsparse.utils.atomic_files import DiskFullError, disk_named
from lightsparse.utils.compat.hydra import is_from_hydra, is_sweep
from lightsparse.utils.rank_errors import EXIT_CODE, RankError


@hydra.main(version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name="config")
def train(composed: DictConfig) -> float:
    """One run; returns what sweepers minimise: bits per byte, or the share of wrong answers where the data asks."""
    with refusals_as_one_sentence():
        raw = on_this_machine(plain(composed))
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
            return objective(fit(config, raw))


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightsparse").setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing them in its own way
    leave_when_asked()
    register_launcher()
    try:
        with refusals_as_one_sentence():
            train()
    except SystemExit as end:
        if is_writing():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
    code, sentence = ending()
    if code:
        sys.stderr.write(f"{sentence}\n")
        sys.exit(code)


def _refuse_ranks_inside_a_sweep(config: Config) -> None:
    """Ranks are started by this command line once more: each would run the whole sweep."""
    if is_sweep() and config.ranks > 1 and launched_ranks() is None:
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


@contextmanager
def refusals_as_one_sentence() -> Iterator[None]:
    """End the program with the sentence alone where the run can't begin or go on and its user can change that."""
    code = 2
    try:
        yield
    except RankError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # at once: threads of a broken process group may wait for the lost rank once more
    except (ConfigError, DataError, NonFiniteError, MemoryShortError) as error:
        sentence = str(error)
    except (DiskFullError, CheckpointLateError) as error:
        sentence, code = str(error), EXIT_CODE
    except Exception as error:
        if not is_from_hydra(error):
            raise
        sentence = explain(error, [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")])
    else:
        return
    sys.stderr.write(f"{sentence}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
