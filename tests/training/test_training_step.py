"""What one step of a run does: clips, follows the schedule and the seed, keeps documents apart, counts what it did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from lightsparse.config.schema import Config
from lightsparse.models.transformer import context_for
from lightsparse.training import run
from lightsparse.training.checkpoints.run_directory import RunDirectory, Start
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.metrics.recorder import Recorder
from lightsparse.training.module import LanguageModel
from lightsparse.training.run import build, fit

Tiny = Callable[..., Config]
PEAK = 1e11  # FLOP/s


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: PEAK)


def built(config: Config) -> run.Run:
    directory = RunDirectory.of(config)
    return build(config, directory, Start(0, None), Recorder(config, directory), Console(quiet=True))


def rows(config: Config) -> list[dict[str, float]]:
    return read_metrics(RunDirectory.of(config).metrics)


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_gradients_are_clipped_at_grad_clip_after_the_division_by_the_targets(tiny: Tiny, monkeypatch, clip) -> None:
    applied = []

    def note(self: LanguageModel, outputs, batch, batch_idx, before=LanguageModel.on_train_batch_end) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        applied.append((float(torch.nn.utils.get_total_norm(gradients)), self.step_result.grad_norm))
        before(self, outputs, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "on_train_batch_end", note)
    fit(tiny(f"trainer.grad_clip={clip}", "trainer.max_steps=3"))
    assert len(applied) == 3
    for after, before in applied:
        assert 0.05 < before < 100  # of a mean over targets; of a sum it would be a hundred times as much
        assert after == pytest.approx(min(clip, before), rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_every_step_has_the_rate_that_the_schedule_gives_it(tiny: Tiny, schedule: str) -> None:
    config = tiny(f"schedule={schedule}", "schedule.warmup_steps=3", "trainer.max_steps=9")
    fit(config)
    rates = [row["learning_rate"] for row in rows(config)[1:]]
    factors = [config.schedule.factor(step, 9) for step in range(9)]
    assert rates == pytest.approx([config.optimizer.arguments["lr"] * factor for factor in factors], rel=1e-6)
    assert len(set(factors)) >= 4 - (schedule == "constant")


def test_the_first_weights_follow_the_seed(tiny: Tiny) -> None:
    one, again, other = (built(tiny(f"seed={seed}", "name=a")).module.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].dim() == 2)


def test_a_packed_document_is_read_as_if_it_were_alone(tiny: Tiny) -> None:
    found = built(tiny("data.pack=isolate", "data.context=512", "eval.tokens=512"))
    batches = (batch for batch in found.data.train_dataloader() if batch["documents"].unique().numel() > 1)
    batch = {name: value[:1] for name, value in next(iter(batches)).items()}
    last = batch["documents"][0] == batch["documents"][0, -1]
    assert 8 < int(last.sum()) < 500
    module, given = found.module.eval(), []
    module.model.register_forward_pre_hook(lambda model, words: given.append(words[1].positions))
    with torch.no_grad():
        _, _, packed = module._forward(batch, key=0)
        alone = module.model(batch["tokens"][:, last], context_for(batch["tokens"][:, last]))
    assert given[0][0, last].tolist() == list(range(int(last.sum())))  # rotary embeddings would not tell
    torch.testing.assert_close(packed.hidden[:, last], alone.hidden, rtol=1e-4, atol=1e-5)


def test_every_step_has_a_randomness_of_its_own_and_every_validation_the_same(tiny: Tiny, monkeypatch) -> None:
    keys: dict[bool, list[int]] = {True: [], False: []}

    def note(self: LanguageModel, batch, key, forward=LanguageModel._forward):
        keys[self.training].append(key)
        return forward(self, batch, key)

    monkeypatch.setattr(LanguageModel, "_forward", note)
    fit(tiny("trainer.max_steps=3", "trainer.accumulate_grad_batches=2", "eval.every_n_steps=1"))
    first, second, third = keys[True][::2]
    assert keys[True] == [first, first, second, second, third, third]
    assert len({first, second, third, *keys[False]}) == 4


def test_bits_per_byte_are_of_the_bytes_that_are_predicted(tiny: Tiny) -> None:
    config = tiny("trainer.max_steps=1")
    found = built(config)
    found.module.token_bytes.copy_(torch.arange(256) % 5)
    run.prepare(found)
    found.trainer.fit(found.module, datamodule=found.data)
    labels = torch.cat([batch["labels"].flatten() for batch in found.data.val_dataloader()])
    expected = int((labels[labels >= 0] % 5).sum())
    validation = found.module.validation
    assert validation is not None and validation.bytes == expected
    assert validation.bits_per_byte == pytest.approx(validation.nats / math.log(2) / expected)


def test_the_density_of_a_step_is_the_mean_over_its_micro_batches(tiny: Tiny) -> None:
    words = ("attention=sliding_window", "attention.window=16", "attention.block=16", "trainer.max_steps=2")
    for batches in (1, 4):
        config = tiny(*words, f"trainer.accumulate_grad_batches={batches}", f"name=by{batches}")
        fit(config)
        layout = run.fixed_layout(config)
        assert layout is not None
        assert [row["attention_density"] for row in rows(config)[1:]] == pytest.approx([layout.density()] * 2, rel=1e-5)


def test_the_seconds_of_training_are_without_those_of_validations(tiny: Tiny, monkeypatch) -> None:
    def slowly(self: LanguageModel, before=LanguageModel.on_validation_epoch_start) -> None:
        time.sleep(0.4)
        before(self)

    monkeypatch.setattr(LanguageModel, "on_validation_epoch_start", slowly)
    summary = fit(tiny("trainer.max_steps=4", "eval.every_n_steps=1"))
    assert summary["wall_s"] - summary["train_s"] > 5 * 0.4


def test_flops_and_mfu_are_of_what_was_computed(tiny: Tiny) -> None:
    words = ("attention=sliding_window", "attention.window=16", "attention.sinks=0", "attention.block=16")
    config = tiny(*words, "data.context=256", "eval.tokens=512", "trainer.max_steps=3")
    fit(config)
    model = built(tiny(*words, "data.context=256", "eval.tokens=512", "name=other")).module.model
    for row in rows(config)[1:]:
        actual, dense = model.flops_per_token(256, row["attention_density"])
        assert row["attention_density"] < 0.3 and actual < 0.95 * dense
        assert row["flops_per_s"] == pytest.approx(actual * row["tokens_per_s"], rel=1e-5)
        assert row["dense_flops_per_s"] == pytest.approx(dense * row["tokens_per_s"], rel=1e-5)
        assert row["mfu"] == pytest.approx(row["flops_per_s"] / PEAK, rel=1e-5)
