"""The command `python train.py …` or `lightsparse train …`: Hydra composes the words, then `work.train` does the run.

A wrong word is one sentence on stderr and exit code 2, before torch and Lightning are imported. With `-m`, sweepers
minimise what `train` returns, each trial is a program of its own, and code 1 says that trials have failed
(sweep/launcher.py).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf

from lightsparse.config.compose import HYDRA_VERSION, composed, conf_dir, handed, plain, refused_in_words
from lightsparse.distributed.environment import ignore_stray_ranks, is_first_rank
from lightsparse.sweep.launcher import ending, register_launcher
from lightsparse.utils.refusal import Refusal
from lightsparse.utils.screen import survive_the_screen


@hydra.main(version_base=HYDRA_VERSION, config_path=str(conf_dir()), config_name="config")
def train(config: DictConfig) -> float:
    """One run; returns what sweepers minimise: bits per byte, or the share of wrong answers where the data asks."""
    try:
        raw = plain(config)
    except Refusal as refusal:  # an error here Hydra would announce in its own way first
        _end(2, str(refusal))
    return _run(raw)


def main() -> None:
    """Run the command line."""
    survive_the_screen()
    logging.basicConfig(format="%(message)s")
    for line in ignore_stray_ranks():  # first: Lightning reads them as it is imported
        logging.warning(line)
    logging.getLogger("lightsparse").setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing them in its own way
    flags = {word for word in sys.argv[1:] if word.startswith("-")}
    words = [word for word in sys.argv[1:] if word not in flags]
    code, sentence = 0, ""
    try:
        config = handed()
        if config is not None:  # a rank or a trial: its words may compose to something else by now
            _run(config)
        elif flags and flags <= {"-h", "--help"}:
            sys.stdout.write(_help(words))
        else:
            register_launcher()
            with refused_in_words([word for word in words if "=" in word]):
                train()
            code, sentence = ending()
    except Refusal as refusal:
        code, sentence = 2, str(refusal)
    if code:
        _end(code, sentence)


def _run(raw: Mapping[str, Any]) -> float:
    from lightsparse.cli.work.train import run

    return run(raw)


def _help(words: list[str]) -> str:
    """What there is to choose and to set; Hydra's own takes seconds, as it reads conf/ anew for every group."""
    files = sorted(conf_dir().glob("*/*.yaml"))
    choices = [
        f"{group}: {', '.join(file.stem for file in of)}" for group, of in groupby(files, lambda file: file.parent.name)
    ]
    return "\n".join((
        "python train.py [group=choice …] [key=value …] [-m for a sweep over key=value,value]",
        "\nGroups and their choices\n", *choices,
        f"\nKeys and their values{' with these words' if words else ''}\n", OmegaConf.to_yaml(composed(words)),
        "--cfg job prints these alone; --hydra-help says what Hydra itself takes\n",
    ))  # fmt: skip


def _end(code: int, sentence: str) -> NoReturn:
    sys.stderr.write(f"{sentence}\n")
    sys.exit(code)
