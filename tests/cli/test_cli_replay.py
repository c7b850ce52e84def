"""The step that ended a run can be taken again, and the place where it went wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightsparse.cli.replay import main
from lightsparse.cli.work.replay import replay
from lightsparse.config.schema import Config
from lightsparse.models.layers import RMSNorm
from lightsparse.training import run
from lightsparse.training.health import NonFiniteError
from lightsparse.training.module import LanguageModel

Tiny = Callable[..., Config]


@pytest.fixture
def ended(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The replay file of a run whose second norm's weight became infinite before step 6."""
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)
    config = tiny("model.depth=2", "health.skip_steps=1", "trainer.accumulate_grad_batches=2")
    training_step = LanguageModel.training_step

    def breaking(self: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            with torch.no_grad():
                _norms(self)[1].weight[3] = torch.inf
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", breaking)
    with pytest.raises(NonFiniteError) as stop:
        run.fit(config)
    path = Path(config.runs_dir) / config.name / "replay" / "step-7-rank-0.pt"
    assert f"file={path}" in str(stop.value)
    return path


def _norms(module: LanguageModel) -> list[RMSNorm]:
    return [part for part in module.model.modules() if isinstance(part, RMSNorm)]


def test_the_batches_of_the_step_and_its_weights_are_kept(ended: Path) -> None:
    content = torch.load(ended, weights_only=True)
    assert content["step"] == 7 and len(content["batches"]) == 2
    assert content["batches"][0]["tokens"].shape == (2, 64)
    broken = [name for name, weight in content["state_dict"].items() if not weight.isfinite().all()]
    assert len(broken) == 1


def test_a_run_whose_layers_kept_their_inputs_in_main_memory_is_replayed_on_the_cpu(ended: Path) -> None:
    expected, stored = replay(ended), ended.parents[1] / "config.yaml"
    before = stored.read_text()
    stored.write_text(before.replace("activation_checkpointing: false", "activation_checkpointing: offload"))
    assert stored.read_text() != before and replay(ended) == expected


def test_the_first_module_with_what_is_no_number_is_named(ended: Path) -> None:
    lines = replay(ended)
    broken = lines[1].removeprefix("weights that are not finite before the step: ")
    assert lines[0].startswith("step 7: the loss is nan; 2 micro-batches")
    assert f"first in the output of {broken.removeprefix('model.').removesuffix('.weight')} (RMSNorm)" in lines[2]
    assert len(lines) == 4


def test_other_files_are_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"file={tmp_path / 'absent.pt'}"]) == 2
    assert main([]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert (
        "must be a file of a run's replay folder" in first
        and "file is missing; write lightsparse replay file=" in second
    )
