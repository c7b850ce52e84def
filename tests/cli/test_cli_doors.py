"""Every door opens at once: what a command imports before its words are right, and a run before its first step.

Counted in modules, as seconds depend on the machine: torch and Lightning are thousands, the others hundreds each.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightsparse.__main__ import VERBS as LISTED

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("torch", "lightning", "torchmetrics", "numpy", "pandas", "scipy", "matplotlib", "datasets", "transformers"),
    *("tokenizers", "wandb", "tensorboard", "optuna", "submitit", "pydantic"),
}
UNUSED = HEAVY - {"torch", "lightning", "torchmetrics", "numpy", "pydantic"}  # by the default run, up to its first step
TRAIN = {  # words of train.py → what is said
    "--help": "attention: adaptive, big_bird, block_sparse",
    "--cfg job": "max_steps: 230",
    "attention.windw=3": "attention.windw is not a key; did you mean attention.window?",
    "attention=mobaa": "attention is mobaa; conf/attention has .*; did you mean moba",
    "seed=1,2": "seed=1,2 gives several values; add -m",
    "data=[": r"data=\[ cannot be read as an override",
    "-m attention.windw=3,4": "attention.windw is not a key",
    "-m attention=dense,mobaa": "attention is mobaa; conf/attention has",
    "-m seed=1,2 seed=[": r"seed=\[ cannot be read as an override",
}
VERBS = {  # words of lightsparse → what is said
    "": r"\n  train +train a model",
    "--help": r"\n  bench +speed and memory",
    "trian": "^trian is not a command; did you mean train",
    "xyzzy": "^xyzzy is not a command; lightsparse has train, evaluate, ",
    "train sede=1": "sede is not a key; did you mean seed",
    "evaluate rn=3": "rn is not a key; did you mean run",
    "evaluate run=runs/x": "nothing is asked for",
    "generate prmpt=x": "prmpt is not a key; did you mean prompt",
    "export run=runs/x": r"out is missing; write lightsparse export run=runs/<name> out=<folder>",
    "prepare out=x data=filez": "data is filez; conf/data has .*; did you mean files",
    "show ot=x.png": "ot is not a key; did you mean out",
    "reach atention=dense": "atention is not a key; did you mean attention",
    "report ot=x": "ot is not a key; did you mean out",
    "replay": "file is missing; write lightsparse replay file=",
    "bench --help": "kernels +block-sparse attention against dense",
    "bench kernls": "bench has no kernls; did you mean kernels",
    **{f"{verb} --help": f"lightsparse {verb} " for verb in ("evaluate", "generate", "export", "prepare", "show")},
    **{f"{verb} --help": f"lightsparse {verb} " for verb in ("reach", "report", "replay")},
}


def imported_by(*words: str, cwd: Path | None = None) -> tuple[str, set[str]]:
    """What a program of Python says, on either output, and the modules that it imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, timeout=300, cwd=cwd, check=False
    )
    lines = done.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == (2 if said else 0) and len(said) < 2, "\n".join(said)
    return done.stdout + "".join(said), modules


def of(modules: set[str], packages: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules} & packages


@pytest.mark.multiprocess
@pytest.mark.parametrize("words", TRAIN)
def test_train_answers_before_torch_is_imported(words: str) -> None:
    said, modules = imported_by(str(ROOT / "train.py"), *words.split())
    assert re.search(TRAIN[words], said), said
    assert not of(modules, HEAVY) and len(modules) < 400


@pytest.mark.multiprocess
@pytest.mark.parametrize("words", VERBS)
def test_every_verb_answers_before_torch_is_imported(words: str) -> None:
    said, modules = imported_by("-m", "lightsparse", *words.split(), cwd=ROOT)
    assert re.search(VERBS[words], said), said
    assert not of(modules, HEAVY) and len(modules) < (450 if words.partition(" ")[0] in LISTED else 100)


FIRST_STEP = """
import os, sys
import lightsparse.cli.work.train
from lightsparse.cli.train import main
from lightsparse.training.module import LanguageModel

def step(*given, **named):
    print(*sys.modules, sep="\\n", flush=True)
    os._exit(0)

LanguageModel.training_step = step
main()
"""


@pytest.mark.multiprocess
def test_a_run_reaches_its_first_step_with_no_import_that_it_does_not_need(tmp_path: Path) -> None:
    words = ("experiment=smoke", "model.depth=1", "data.context=256", "eval.tokens=2048", f"runs_dir={tmp_path}")
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, *words], capture_output=True, text=True, timeout=300, check=False
    )
    modules = set(done.stdout.splitlines())
    assert done.returncode == 0 and "lightning.pytorch.trainer.trainer" in modules, done.stderr
    assert not of(modules, UNUSED) and len(modules) < 3300
