"""conf/experiment/: every recipe says how it is started, and each of its commands composes and passes the check."""

import re
import shlex
from dataclasses import replace

import pytest
import torch

from lightsparse import hf
from lightsparse.config.compose import conf_dir
from lightsparse.config.parse import compose
from lightsparse.hf.weights import dense_core
from lightsparse.models import RopeConfig, Transformer
from lightsparse.training.preflight.check import check

RECIPES = sorted((conf_dir() / "experiment").glob("*.yaml"))


def comment_lines(path):
    """The lines of the comment at the top, without their #."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]


def commands(path):
    """The command lines of the comment: indented by three blanks, a remark after them set off by two."""
    found = [re.split(r"\s{2,}\(", line.strip())[0] for line in comment_lines(path) if line.startswith("   ")]
    return [shlex.split(line) for line in found if "train.py" in line]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_and_what_to_expect(path):
    assert comment_lines(path)[0].strip() == "@package _global_"
    assert commands(path) and all(
        f"experiment={path.stem}" in words or "experiment=" not in " ".join(words) for words in commands(path)
    )
    assert any(f"experiment={path.stem}" in words for words in commands(path))
    said = [line for line in comment_lines(path)[2:] if not line.startswith("   ")]
    assert said  # cost and result


def exported(config, folder):
    """Random weights of the model's form as a folder of transformers, trained on positions that are not stretched."""
    plain = replace(config.model, rope=RopeConfig(base=config.model.rope.base))
    vocabulary = config.data.vocab_size
    model = Transformer(plain, dense_core, vocab_size=vocabulary)
    context = config.model.rope.original_context
    hf.save_model(model, hf.their_config(plain, vocabulary, context=context), folder, dtype=torch.float32)


CASES = [
    pytest.param(words[words.index("train.py") + 1 :], id=f"{path.stem}-{number}")
    for path in RECIPES
    for number, words in enumerate(commands(path))
]


@pytest.mark.parametrize("words", CASES)
def test_the_commands_of_a_recipe_compose_and_pass_the_check(words, tmp_path, monkeypatch):
    overrides = [word for word in words if word != "-m"]
    for word in overrides:
        if word.startswith("init_from="):  # what the commands before it make
            monkeypatch.chdir(tmp_path)
            exported(compose(overrides), tmp_path / word.partition("=")[2])
    if "-m" in words:  # the first trial
        overrides = [re.sub(r"^([\w./]+=[^\[(]*?),.*", r"\1", word) for word in overrides]
    check(compose(overrides))


def test_the_density_sweep_varies_what_its_comment_says():
    text = (conf_dir() / "experiment/density_sweep.yaml").read_text(encoding="utf-8")
    assert "attention.density: 0.09,0.205,0.41,0.8" in text and "seed: 1,2,3" in text
    for density in (0.09, 0.205, 0.41, 0.8):
        check(compose(["experiment=density_sweep", f"attention.density={density}"]))
