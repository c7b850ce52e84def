"""A run that distils SeerAttention's gates: the model frozen, attention dense, the gate nearer to it than none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightsparse.config.schema import Config
from lightsparse.training import run
from lightsparse.training.checkpoints.load_run import load_run
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.module import language_model
from lightsparse.training.run import fit


def test_distilling_moves_the_gates_towards_attention_and_nothing_else(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)
    config = tiny(
        *("attention=seer", "attention.block=16", "attention.top_k=3", "data.context=160", "trainer.max_steps=8"),
        *("attention.dense_steps=7", "trainer.selector_only_steps=-1", "optimizer=adamw", "optimizer.lr=0.01"),
    )
    fit(config)
    directory = Path(config.runs_dir) / config.name
    table = read_metrics(directory / "metrics.csv")[1:]
    assert [row["attention_density"] == 1 for row in table] == [True] * 7 + [False]
    above = [row["selection_kl"] / row["uniform_kl"] for row in table]
    assert min(above[-3:]) < above[0] and all(0 < row["kept_mass"] <= 1 for row in table)

    trained = load_run(directory)
    torch.manual_seed(config.seed)
    untrained = language_model(config, trained.tokenizer).model.state_dict()
    moved = {name for name, value in trained.model.state_dict().items() if not torch.equal(value, untrained[name])}
    gates = {name for name in untrained if ".gate.query" in name or ".gate.key" in name}
    assert moved == gates and gates
    assert not trained.model.cores[0].dense_now  # evaluated in the stage of its last step
