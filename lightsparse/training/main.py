"""The command `python train.py …` or `lightsparse-train …`: compose → parse and check → build and fit.

A wrong config is one sentence on stderr and exit code 2. Exit code 75 means that the same command continues the run: it
was stopped by a signal and has saved its step, or another rank of the job was lost or did not come in time, which is
one sentence on stderr, too (all codes: parallel/errors.py). With `-m`, sweepers minimise what `train` returns.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hydra
from omegaconf import DictConfig

from lightsparse.config import check, explain, parse, with_launched_ranks
from lightsparse.data import DataError
from lightsparse.overrides import HYDRA_VERSION, conf_dir, plain, raised_by_hydra
from lightsparse.parallel.errors import EXIT_CODE, RankError
from lightsparse.targets import ConfigError
from lightsparse.training.preemption import leave_when_asked
from lightsparse.training.ranks import is_first_rank
from lightsparse.training.run import fit


@hydra.main(version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name="config")
def train(composed: DictConfig) -> float:
    """One run; returns its validation bits per byte."""
    with refusals_as_one_sentence():
        raw = with_launched_ranks(plain(composed))
        config = parse(raw)
        check(config)
        return float(fit(config, raw)["val_bits_per_byte"])


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightsparse").setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing them in its own way
    leave_when_asked()
    with refusals_as_one_sentence():
        train()


@contextmanager
def refusals_as_one_sentence() -> Iterator[None]:
    """End the program with the sentence alone where the config or its data cannot be used, or another rank is lost."""
    try:
        yield
    except RankError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # at once: threads of a broken process group may wait for the lost rank once more
    except (ConfigError, DataError) as error:
        sentence = str(error)
    except Exception as error:
        if not raised_by_hydra(error):
            raise
        sentence = explain(error, [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")])
    else:
        return
    sys.stderr.write(f"{sentence}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
