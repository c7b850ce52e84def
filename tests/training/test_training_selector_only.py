"""Steps that train only what selects: everything else keeps its bits, and then moves as if it were the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.training import run
from lightsparse.training.checkpoints.files import checkpoint_path, read_checkpoint
from lightsparse.training.module import LanguageModel
from lightsparse.training.preflight.check import check
from lightsparse.training.run import fit

Tiny = Callable[..., Config]
ROUTED = (
    *("attention=adaptive", "attention.block=16", "attention.density=0.5", "attention.router_dim=4"),
    *("checkpoint.every_n_steps=1", "checkpoint.keep=20", "checkpoint.keep_best=false", "schedule.warmup_steps=0"),
    *("trainer.max_steps=6", "trainer.selector_only_steps=3"),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longer than the steps: plots, and measuring the machine."""
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)


class Killed(Exception):
    """Stands for SIGKILL where the test must live on."""


def at(config: Config, step: int) -> dict[str, Any]:
    return read_checkpoint(checkpoint_path(Path(config.runs_dir, config.name, "checkpoints"), step))


def selects(name: str) -> bool:
    return ".core.router." in name


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Parameters that differ; the temperature of the gates is a buffer."""
    return {name for name in before if not name.endswith(".schedule") and not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "words",
    [
        ("optimizer=adamw", "optimizer.weight_decay=0.5", "trainer.accumulate_grad_batches=2"),
        ("optimizer=muon", "optimizer.weight_decay=0.5", "model.activation_checkpointing=true"),
        ("optimizer=adamw", "optimizer.weight_decay=0.5", "strategy=ddp"),
    ],
    ids=["adamw-accumulate", "muon-recompute", "ddp"],
)
def test_all_but_the_selection_keeps_its_bits_and_then_moves(words: tuple[str, ...], tiny: Tiny) -> None:
    config = tiny(*ROUTED, *words)
    try:
        fit(config)
    finally:
        if dist.is_initialized():  # a run leaves its group to the end of its process, which here others share
            dist.destroy_process_group()
    first, third, fourth = (at(config, step)["state_dict"] for step in (1, 3, 4))
    learned = {name for name in first if not name.endswith(".schedule")}
    assert moved(first, third) == set(filter(selects, learned)) and moved(third, fourth) == learned


def test_what_was_frozen_has_no_optimizer_state_and_begins_with_its_own_first_step(tiny: Tiny) -> None:
    config = tiny(*ROUTED, "optimizer=adamw")
    fit(config)
    third, last = (at(config, step)["optimizer_states"][0]["state"] for step in (3, 6))
    assert {float(entries["step"]) for entries in third.values()} == {3.0} and len(third) == 4  # of the router
    assert {number: float(entries["step"]) for number, entries in last.items()} == {
        number: 6.0 if number in third else 3.0 for number in last
    }


def test_the_first_gradients_that_count_are_those_of_the_selection_alone(tiny: Tiny) -> None:
    """Clipping by a norm that holds frozen gradients would slow the selection down."""
    seen: list[tuple[float, float]] = []
    whole = LanguageModel.on_before_optimizer_step

    def looked(self: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
        whole(self, optimizer)
        grads = [parameter.grad for parameter in self.model.selector_parameters()]
        assert self.step_result is not None
        own = torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])
        seen.append((self.step_result.grad_norm, float(own)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "on_before_optimizer_step", looked)
        fit(tiny(*ROUTED))
    assert all(norm == pytest.approx(own, rel=1e-6) and own > 0 for norm, own in seen[:3])
    assert all(norm > 2 * own for norm, own in seen[3:])


@pytest.mark.parametrize("last", [2, 3, 4])
def test_a_run_that_goes_on_in_the_middle_of_it_ends_with_the_same_bits(last: int, tiny: Tiny) -> None:
    whole = tiny(*ROUTED, "name=whole", "schedule=constant")
    fit(whole)
    parts = tiny(*ROUTED, "name=parts", "schedule=constant")
    go_on = LanguageModel.training_step

    def killed(self: LanguageModel, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == last:
            raise Killed
        return go_on(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LanguageModel, "training_step", killed)
        fit(parts)
    fit(parts)
    wanted, found = at(whole, 6)["state_dict"], at(parts, 6)["state_dict"]
    assert not moved(wanted, found)


def test_minus_one_is_the_whole_run(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(*ROUTED, "trainer.selector_only_steps=-1")
    fit(config)
    first, last = (at(config, step)["state_dict"] for step in (1, 6))
    assert moved(first, last) == {name for name in first if selects(name) and not name.endswith(".schedule")}
    assert "all steps train only what selects" in capsys.readouterr().out


def test_the_start_says_how_many_steps_train_how_much(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny(*ROUTED))
    # of two heads, width 16, router_dim 4: two matrices, an offset and a temperature
    assert "stage    steps 1 to 3 of 6 train only what selects: 260 parameters" in capsys.readouterr().out


def test_the_start_says_that_the_chosen_attention_is_in_no_layer(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny("attention=moba", "model.layer_pattern=D"))
    assert "layers   D, none of them S: attention=moba is in no layer" in capsys.readouterr().out


def test_wrong_values_are_refused_in_one_sentence(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"trainer.selector_only_steps is -2; it counts optimizer steps, 0 or more"):
        tiny(*ROUTED, "trainer.selector_only_steps=-2")
    config = tiny("trainer.selector_only_steps=3")
    with pytest.raises(ConfigError, match=r"attention=dense has no parameters that select, .* set it to 0"):
        check(config)
    with pytest.raises(ConfigError, match=r"strategy.comm_hook is topk, which would hand on the gradients"):
        tiny(*ROUTED, "strategy=ddp", "strategy.comm_hook=topk", "strategy.topk_share=0.1")
