"""Runs that end or go on elsewhere than planned: numbers belong to their weights, an end is an end, rates are new."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.training import preemption, run
from lightsparse.training.checkpoints.files import checkpoint_path, read_checkpoint
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.preflight.check import check
from lightsparse.training.run import fit

Tiny = Callable[..., Config]
CALLBACKS = "lightning.pytorch.callbacks"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)


def folder(config: Config) -> Path:
    return Path(config.runs_dir) / config.name


def rows(config: Config) -> list[dict[str, float]]:
    return read_metrics(folder(config) / "metrics.csv")


def stopped_at(tiny: Tiny, step: int, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A run that was asked to stop after a step."""
    with monkeypatch.context() as patched:
        asked = preemption.Preemption.agreed
        patched.setattr(
            preemption.Preemption,
            "agreed",
            lambda self, trainer: signal.SIGTERM if trainer.global_step == step else asked(self, trainer),
        )
        with pytest.raises(SystemExit) as ended:
            fit(tiny(*words))
        assert ended.value.code == 75


def test_a_run_that_is_stopped_and_then_asked_for_no_more_validates_the_weights_it_has(tiny, monkeypatch) -> None:
    stopped_at(tiny, 2, monkeypatch, "trainer.max_steps=9", "eval.every_n_steps=8", "schedule=constant")
    straight = fit(tiny("trainer.max_steps=2", "name=straight", "schedule=constant"))
    config = tiny("trainer.max_steps=2", "eval.every_n_steps=8", "schedule=constant")
    summary = fit(config)
    assert summary["steps"] == 2 and summary["val_loss"] == straight["val_loss"]
    assert rows(config)[-1]["step"] == 2 and rows(config)[-1]["val_loss"] == pytest.approx(straight["val_loss"])
    assert fit(config)["val_loss"] == straight["val_loss"]


def test_fewer_steps_than_have_been_trained_are_refused(tiny, monkeypatch) -> None:
    stopped_at(tiny, 4, monkeypatch, "trainer.max_steps=9")
    with pytest.raises(ConfigError, match=r"^trainer\.max_steps is 2 and .* has trained 4 steps; raise it, or use "):
        fit(tiny("trainer.max_steps=2"))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_first_step_of_an_extended_run_has_the_rate_of_the_longer_schedule(tiny, schedule) -> None:
    words = (f"schedule={schedule}", "schedule.warmup_steps=1", "trainer.log_every_n_steps=1")
    fit(tiny(*words, "trainer.max_steps=4"))
    config = tiny(*words, "trainer.max_steps=8")
    fit(config)
    base = config.optimizer.arguments["lr"]
    rates = [row["learning_rate"] for row in rows(config) if row["step"] > 4]
    assert rates == pytest.approx([base * config.schedule.factor(step, 8) for step in range(4, 8)], rel=1e-6)
    fit(tiny(*words, "trainer.max_steps=8", "name=at_once"))
    states = [
        read_checkpoint(checkpoint_path(folder(config).with_name(name) / "checkpoints", 8))["optimizer_states"][0]
        for name in (config.name, "at_once")
    ]
    assert [group["lr"] for group in states[0]["param_groups"]] == [group["lr"] for group in states[1]["param_groups"]]


def test_where_a_callback_ends_a_run_it_is_finished_until_the_callbacks_change(tiny) -> None:
    words = (
        f"+callbacks.stop={{_target_: {CALLBACKS}.EarlyStopping, monitor: val_loss, stopping_threshold: 1000.0}}",
        "eval.every_n_steps=2",
    )
    config = tiny(*words)
    assert fit(config)["steps"] == 2
    assert json.loads((folder(config) / "summary.json").read_text())["finished"]
    before = rows(config)
    assert fit(config)["steps"] == 2 and rows(config) == before
    assert fit(tiny(words[1], f"name={config.name}"))["steps"] == config.trainer.max_steps


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        ("GradientAccumulationScheduler, scheduling: {0: 4}", r"set trainer\.accumulate_grad_batches"),
        ("BatchSizeFinder", "doctor=true"),
        ("LearningRateFinder", r"sweep optimizer\.lr"),
        ("StochasticWeightAveraging, swa_lrs: 0.1", "use schedule=wsd"),
        ("ModelPruning, pruning_fn: l1_unstructured", "leave it out"),
    ],
)
def test_a_callback_that_changes_the_trainer_is_refused_by_name(tiny, callback, instead) -> None:
    name = callback.partition(",")[0]
    with pytest.raises(ConfigError, match=rf"^callbacks\.it is {name}, which changes what a step is, .*; {instead}"):
        check(tiny(f"+callbacks.it={{_target_: {CALLBACKS}.{callback}}}"))


def test_micro_batches_that_something_else_has_accumulated_end_the_run(tiny, monkeypatch) -> None:
    from lightning.pytorch.callbacks import Callback

    def accumulate(self, trainer, *given) -> None:
        trainer.accumulate_grad_batches = 4

    monkeypatch.setattr(Callback, "on_train_epoch_start", accumulate)
    with pytest.raises(ConfigError, match=r"^step 1 has accumulated 4 micro-batches and trainer\.accumulate_grad_bat"):
        fit(tiny())
    assert torch.is_grad_enabled()
