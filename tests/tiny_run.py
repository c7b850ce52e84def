"""A run that takes a second: a tiny model on a text of a few kilobytes, configured through conf/ as a user would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightsparse.config.compose import compose_raw
from lightsparse.config.parse import parse
from lightsparse.config.schema import Config

TINY = (
    "precision=32",
    "attention=dense",
    "data=files",
    "model=nano",
    "model.depth=1",
    "model.embed_dim=32",
    "model.heads=2",
    "model.head_dim=16",
    "data.context=64",
    "data.batch_size=2",
    "eval.tokens=512",
    "eval.every_n_steps=4",
    "eval.sample_tokens=16",
    "checkpoint.every_n_steps=5",
    "trainer.max_steps=12",
    "trainer.progress=false",
    "trainer.log_every_n_steps=1",
    "threads=1",
    "name=tiny",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents with something to learn in them."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        words = " ".join(f"{i * j % 17} times {j} is {i * j}," for j in range(60))
        (folder / f"{i:02}.txt").write_text(f"Document {i}. {words} and so on.\n", encoding="utf-8")
    return folder


@pytest.fixture
def overrides(tmp_path: Path, corpus: Path) -> list[str]:
    """The command-line words of a tiny run below tmp_path."""
    return [*TINY, f"data.path={corpus}/*.txt", f"runs_dir={tmp_path / 'runs'}"]


@pytest.fixture
def tiny(overrides: list[str]) -> Callable[..., Config]:
    """tiny(*more) → the config of such a run."""
    return lambda *more: parse(compose_raw([*overrides, *more]))


@pytest.fixture
def command(overrides: list[str]) -> Callable[..., list[str]]:
    """command(*more) → the same run as a process of its own."""
    script = Path(__file__).parents[1] / "train.py"
    return lambda *more: [sys.executable, str(script), *overrides, *more]
