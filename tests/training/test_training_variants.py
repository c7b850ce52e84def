"""Every variant trains through the same config as a user's, and a learned one tells how it is doing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lightsparse.config.compose import conf_dir
from lightsparse.config.schema import Config
from lightsparse.training import run
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.module import LanguageModel
from lightsparse.training.run import fit

Tiny = Callable[..., Config]
YAMLS = {path.stem: OmegaConf.load(path) for path in sorted((conf_dir() / "attention").glob("*.yaml"))}
VARIANTS = list(YAMLS)
TIMINGS = {"wall_s", "tokens_per_s", "flops_per_s", "dense_flops_per_s", "mfu"}


class Killed(Exception):
    """Stands for SIGKILL where the test must live on."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)


def rows(config: Config) -> list[dict[str, float]]:
    return read_metrics(Path(config.runs_dir) / config.name / "metrics.csv")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_writes_by_override(name: str, tiny: Tiny) -> None:
    config = tiny(f"attention={name}", "data.context=160", "trainer.max_steps=3", "eval.every_n_steps=3")
    summary = fit(config)
    assert summary["attention"] == name and summary["steps"] == 3
    table = rows(config)
    assert [row["step"] for row in table] == [0, 1, 2, 3]
    assert table[-1]["val_loss"] < table[0]["val_loss"]
    # Above 1 where several branches read the same tokens and each is as long as this context (nsa).
    assert all(0 < row["attention_density"] <= 2.5 for row in table[1:])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_was_killed_ends_with_the_same_bits(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own columns included; one with a dense stage goes on within it."""
    staged = ["attention.dense_steps=3"] if "dense_steps" in YAMLS[name] else []
    words = (f"attention={name}", *staged, "data.context=160", "trainer.max_steps=4", "eval.every_n_steps=2")
    whole, parts = (
        tiny(*words, "checkpoint.every_n_steps=1", "eval.sample_tokens=0", f"name={each}")
        for each in ("whole", "parts")
    )
    fit(whole)
    step = LanguageModel.training_step

    def dies(self: LanguageModel, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 2:
            raise Killed
        return step(self, batch, index)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(LanguageModel, "training_step", dies)
        fit(parts)
    fit(parts)
    one, two = ([{k: v for k, v in row.items() if k not in TIMINGS} for row in rows(each)] for each in (whole, parts))
    assert one == two
    one, two = (
        torch.load(Path(each.runs_dir) / each.name / "checkpoints" / "step-4.ckpt", weights_only=True)["state_dict"]
        for each in (whole, parts)
    )
    assert one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_router_reports_its_gates_its_heads_and_its_churn(tiny: Tiny) -> None:
    config = tiny("attention=adaptive", "data.context=320", "trainer.max_steps=8", "optimizer.adamw_lr=0.05")
    fit(config)
    table = rows(config)
    for row in table[1:]:
        heads = [row["head_density_0"], row["head_density_1"]]
        assert sum(heads) / 2 == pytest.approx(row["attention_density"], rel=1e-5)
        assert 0 < row["router_gate"] < 1 and 0 < row["router_entropy"] <= 0.6932 and 0 <= row["router_capped"] <= 1
    taus = [row["router_tau"] for row in table[1:]]
    assert taus[0] > taus[-1] > 0  # annealed over the run
    churns = [row["choice_churn"] for row in table if "choice_churn" in row]
    assert [row["step"] for row in table if "choice_churn" in row] == [4, 8] and all(0 <= c <= 1 for c in churns)


def test_a_fixed_pattern_has_no_such_columns(tiny: Tiny) -> None:
    config = tiny("trainer.max_steps=1")
    fit(config)
    assert not [name for row in rows(config) for name in row if "router" in name or "churn" in name or "head_" in name]
