"""The command `python train.py …` or `lightsparse-train …`: compose → parse and check → build and fit.

A wrong config is one sentence on stderr and exit code 2; a run stopped by SIGTERM saves its step and ends with code 75:
the same command continues it. With `-m`, sweepers minimise what `train` returns.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hydra
from omegaconf import DictConfig

from lightsparse.config import check, explain, parse
from lightsparse.data import DataError
from lightsparse.overrides import HYDRA_VERSION, conf_dir, plain, raised_by_hydra
from lightsparse.targets import ConfigError
from lightsparse.training.run import fit


@hydra.main(version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name="config")
def train(composed: DictConfig) -> float:
    """One run; returns its validation bits per byte."""
    with refusals_as_one_sentence():
        raw = plain(composed)
        config = parse(raw)
        check(config)
        return float(fit(config, raw)["val_bits_per_byte"])


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightsparse").setLevel(logging.INFO)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing them in its own way
    with refusals_as_one_sentence():
        train()


@contextmanager
def refusals_as_one_sentence() -> Iterator[None]:
    """End the program with exit code 2 and the sentence alone, where the config or its data cannot be used."""
    try:
        yield
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
