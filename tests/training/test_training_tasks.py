"""Runs on a task: answers are scored, the goal ends them, nothing depends on interruptions, and words fit symbols."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightsparse.config.compose import compose_raw
from lightsparse.config.parse import compose, parse
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.models.transformer import Transformer
from lightsparse.training import run
from lightsparse.training.measures.scores import Scores, score_sums
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.metrics.summary import sweep_metric
from lightsparse.training.module import LanguageModel
from lightsparse.training.run import fit

Tiny = Callable[..., Config]
RECALL = (
    "data=h3_recall",
    "data.vocabulary=6",
    "data.context=12",
    "data.examples=64",
    "data.batch_size=8",
    "eval.tokens=240",
    "model.positions=learned",
    "model.mlp=gelu",
    "model.dropout=0.1",
    "optimizer=adamw",
)


class Killed(Exception):
    """Stands for SIGKILL where the test must live on."""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """task(*more) → the config of a tiny run on recall."""
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)
    sizes = ("model=nano", "model.depth=1", "model.embed_dim=32", "model.heads=2", "model.head_dim=16")
    pace = ("trainer.max_steps=12", "trainer.progress=false", "trainer.log_every_n_steps=4", "threads=1")
    when = ("eval.every_n_steps=4", "checkpoint.every_n_steps=5", f"runs_dir={tmp_path / 'runs'}", "name=tiny")

    def composed(*more: str) -> Config:
        return parse(compose_raw(["attention=dense", *RECALL, *sizes, *pace, *when, *more]))

    return composed


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longer than a few steps: plots, and measuring the machine."""
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)


def folder(config: Config) -> Path:
    return Path(config.runs_dir) / config.name


def test_a_run_on_a_task_leaves_scores_in_place_of_bits(task: Tiny) -> None:
    config = task()
    summary = fit(config)
    assert 0 <= summary["val_accuracy"] <= 1 and summary["val_exact_match"] == summary["val_accuracy"]
    assert summary["val_tokens"] == 20 and summary["val_bits_per_byte"] is None
    assert sweep_metric(summary) == pytest.approx(1 - summary["val_accuracy"])
    rows = read_metrics(folder(config) / "metrics.csv")
    scored = [row["step"] for row in rows if "val_accuracy" in row]
    assert scored == [0, 4, 8, 12] and not any("val_bits_per_byte" in row for row in rows)
    for name in ("plots/loss.png", "plots/accuracy.png", "plots/loss_by_position.png"):
        assert (folder(config) / name).stat().st_size > 0
    assert "════ the model ════" in (folder(config) / "sample.txt").read_text()


@pytest.mark.usefixtures("quick")
def test_a_text_run_has_no_scores(tiny: Tiny) -> None:
    config = tiny("trainer.max_steps=2", "eval.sample_tokens=0")
    summary = fit(config)
    assert summary["val_accuracy"] is None and sweep_metric(summary) == summary["val_bits_per_byte"]


@pytest.mark.usefixtures("quick")
def test_the_goal_ends_a_run_which_is_not_repeated(task: Tiny) -> None:
    words = ("eval.stop_accuracy=0.05", "trainer.max_steps=400")  # chance is 0.5
    config = task(*words)
    summary = fit(config)
    assert summary["steps"] < 400 and summary["val_accuracy"] >= 0.05
    assert (folder(config) / "checkpoints" / f"step-{summary['steps']}.ckpt").exists()
    stamp = (folder(config) / "summary.json").stat().st_mtime_ns
    assert fit(config) == json.loads((folder(config) / "summary.json").read_text())
    assert (folder(config) / "summary.json").stat().st_mtime_ns == stamp
    higher = task("eval.stop_accuracy=1.0", f"trainer.max_steps={summary['steps'] + 2}")
    assert fit(higher)["steps"] == summary["steps"] + 2  # a higher goal goes on


def test_a_run_killed_after_its_goal_ends_when_it_is_started_again(task: Tiny) -> None:
    config = task("eval.stop_accuracy=0.05", "trainer.max_steps=400")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "draw_plots", lambda *given: (_ for _ in ()).throw(Killed))
        fit(config)
    summary = fit(config)
    assert summary["steps"] == 4 and summary["val_accuracy"] >= 0.05


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_with_dropout_ends_with_the_same_bits(task: Tiny) -> None:
    whole = task("name=whole")
    fit(whole)
    parts = task("name=parts")
    whole_step = LanguageModel.training_step

    def dying(self: LanguageModel, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 7:
            raise Killed
        return whole_step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LanguageModel, "training_step", dying)
        fit(parts)
    fit(parts)
    states = [
        torch.load(folder(c) / "checkpoints" / "step-12.ckpt", weights_only=True)["state_dict"] for c in (whole, parts)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_scores_count_answers_and_whole_examples(task: Tiny) -> None:
    config = task()
    model = config_model(config)
    hidden = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(0))
    said = model.logits(hidden).argmax(-1)
    labels = torch.full((3, 12), -100)
    labels[0, [2, 5]] = said[0, [2, 5]]  # both right
    labels[1, 3], labels[1, 4] = said[1, 3], (said[1, 4] + 1) % 6  # one of two; sample 2 asks nothing
    assert Scores(*score_sums(model, hidden, labels, None).tolist()) == Scores(3, 4, 1, 2)
    assert Scores(3, 4, 1, 2).accuracy == 0.75 and Scores(3, 4, 1, 2).exact_match == 0.5


def config_model(config: Config) -> Any:
    return Transformer(config.model, config.attention.build, vocab_size=config.data.vocab_size, context=12)


@pytest.mark.usefixtures("quick")
def test_tasks_in_the_training_loop_leave_their_files_and_change_no_weight(tiny: Tiny) -> None:
    plain = tiny("name=plain", "data.context=256", "eval.tokens=512")
    fit(plain)
    words = ("eval.tasks.names=[passkey]", "eval.tasks.every_n_steps=6", "eval.tasks.lengths=[512]")
    watched = tiny("name=watched", "data.context=256", "eval.tokens=512", *words, "eval.tasks.examples=1")
    fit(watched)
    for step in (6, 12):
        found = json.loads((folder(watched) / "evaluation" / f"step-{step}" / "passkey.json").read_text())
        assert found["step"] == step and [row["depth"] for row in found["rows"]] == [0.0, 0.5, 1.0]
        assert (folder(watched) / "evaluation" / f"step-{step}" / "passkey.png").exists()
    first, second = (
        torch.load(folder(c) / "checkpoints" / "step-12.ckpt", weights_only=True)["state_dict"]
        for c in (plain, watched)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("objective=mlm",), "objective is mlm, but the data is a task"),
        (("eval.stop_accuracy=1.5",), "eval.stop_accuracy is 1.5"),
        (("eval.stop_accuracy=0.5", "data=stdlib", "data.batch_size=1"), "asks nothing that could be right"),
        (("eval.tasks.depths=[2.0]",), r"eval\.tasks\.depths is \[2\.0\]"),
        (("eval.tasks.names=[passkey]", "strategy=fsdp", "trainer.devices=2"), "which no rank can answer"),
    ],
)
def test_what_does_not_fit_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    given = ["data=mqar", *words] if not any(word.startswith("data=") for word in words) else list(words)
    with pytest.raises(ConfigError, match=sentence):
        compose(given)
