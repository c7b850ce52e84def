"""Every variant trains through the same config as a user's, and a learned one tells how it is doing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightsparse.overrides import conf_dir
from lightsparse.schema import Config
from lightsparse.training import run
from lightsparse.training.metrics import read_metrics
from lightsparse.training.run import fit

Tiny = Callable[..., tuple[Config, dict[str, Any]]]
VARIANTS = sorted(path.stem for path in (conf_dir() / "attention").glob("*.yaml"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)


def rows(config: Config) -> list[dict[str, float]]:
    return read_metrics(Path(config.runs_dir) / config.name / "metrics.csv")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_and_writes_by_override(name: str, tiny: Tiny) -> None:
    config, raw = tiny(f"attention={name}", "data.context=160", "trainer.max_steps=3", "eval.every_n_steps=3")
    summary = fit(config, raw)
    assert summary["attention"] == name and summary["steps"] == 3
    table = rows(config)
    assert [row["step"] for row in table] == [0, 1, 2, 3]
    assert table[-1]["val_loss"] < table[0]["val_loss"]
    # Above 1 where several branches read the same tokens and each is as long as this context (nsa).
    assert all(0 < row["attention_density"] <= 2.5 for row in table[1:])


def test_a_router_reports_its_gates_its_heads_and_its_churn(tiny: Tiny) -> None:
    config, raw = tiny("attention=adaptive", "data.context=320", "trainer.max_steps=8", "optimizer.adamw_lr=0.05")
    fit(config, raw)
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
    config, raw = tiny("trainer.max_steps=1")
    fit(config, raw)
    assert not [name for row in rows(config) for name in row if "router" in name or "churn" in name or "head_" in name]
