"""A checkpoint that holds NaN is a damaged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightsparse.training.checkpoints.files import newest_checkpoint
from lightsparse.training.checkpoints.finite import not_finite


def saved(path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, path)
    return path


def content() -> dict[str, Any]:
    weights = {"embed.weight": torch.randn(7, 3), "token_bytes": torch.ones(4, dtype=torch.int64)}
    momenta = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(7, 3, dtype=torch.bfloat16)}}
    return {"state_dict": weights, "optimizer_states": [{"state": momenta, "param_groups": [{"lr": 1e-3}]}]}


def test_finite_numbers_of_any_size_pass(tmp_path: Path) -> None:
    whole = content()
    whole["state_dict"]["large"] = torch.full((9,), 3e38)  # whose sum is infinite
    whole["state_dict"]["empty"] = torch.zeros(0)
    whole["callbacks"] = {"best": torch.tensor(float("inf"))}  # no weight
    assert not_finite(whole) is None and not_finite({"global_step": 3}) is None
    assert newest_checkpoint(saved(tmp_path / "step-1.ckpt", whole).parent) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_wrong_number_in_weights_or_optimizer_is_found_and_named(value: float) -> None:
    broken = content()
    broken["state_dict"]["embed.weight"][4, 2] = value
    found = not_finite(broken)
    assert found == "1 of 21 numbers in state_dict.embed.weight are NaN or infinite"
    broken = content()
    broken["optimizer_states"][0]["state"][0]["exp_avg"][0] = value
    found = not_finite(broken)
    assert found == "3 of 21 numbers in optimizer_states[0].state.0.exp_avg are NaN or infinite"


def test_a_checkpoint_with_nan_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "step-5.ckpt", content())
    broken = content()
    broken["state_dict"]["embed.weight"][0, 0] = float("nan")
    saved(tmp_path / "step-6.ckpt", broken)
    with caplog.at_level("WARNING"):
        assert newest_checkpoint(tmp_path) == (5, tmp_path / "step-5.ckpt")
    assert "step-6.ckpt IS DAMAGED (1 of 21 numbers in state_dict.embed.weight are NaN" in caplog.text
