"""The estimate against what a step really keeps and takes, and what it proposes instead."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lightsparse.config.compose import compose_raw
from lightsparse.config.parse import compose, parse
from lightsparse.config.schema import Config
from lightsparse.data import ByteTokenizer
from lightsparse.models import transformer
from lightsparse.models.transformer import context_for
from lightsparse.optim.optimizers import parameter_groups
from lightsparse.training import run
from lightsparse.training.module import language_model
from lightsparse.training.preflight.check import meta_model
from lightsparse.training.preflight.estimate import estimate, optimizer_bytes, remedies
from lightsparse.utils.machine import in_child
from lightsparse.utils.text import size

VARIANTS = ("dense", "block_sparse", "sliding_window", "big_bird", "dilated", "hierarchical", "adaptive")
RECOMPUTED, OFFLOAD = (f"model.activation_checkpointing={way}" for way in ("true", "offload"))
SHAPE = (
    "precision=32",
    "model.depth=2",
    "model.heads=2",
    "model.embed_dim=96",
    "model.head_dim=48",
    "data.context=512",
)


def kept_bytes(config: Config) -> int:
    """What autograd keeps of one forward pass, each storage once, without the parameters and their copies."""
    model = language_model(config, ByteTokenizer()).model
    if config.precision == "bf16-true":
        model = model.bfloat16()
    model.set_step(0, 10)
    tokens = torch.randint(0, 255, (config.data.batch_size, config.data.context))
    weights = {parameter.numel() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other one takes its place
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16-mixed" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        model.loss_sum(model(tokens, context_for(tokens)).hidden, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16-true"])
def test_the_activations_of_every_variant_are_those_that_autograd_keeps(attention: str, precision: str) -> None:
    config = compose([*SHAPE, f"attention={attention}", f"precision={precision}"])
    assert estimate(config).activations == pytest.approx(kept_bytes(config), rel=0.15)


@pytest.mark.parametrize(
    "word",
    [
        "model.activation_checkpointing=true",
        "model.chunk=128",
        "model.kv_heads=1",
        "model.qk_norm=false",
        "data.batch_size=3",
    ],
)
def test_the_activations_follow_the_settings_that_change_them(word: str) -> None:
    config = compose([*SHAPE, "attention=sliding_window", word])
    assert estimate(config).activations == pytest.approx(kept_bytes(config), rel=0.15)


class Cloning:
    """Copies to a memory of their own, at once."""

    def __init__(self) -> None:
        self.away: list[Tensor] = []

    def out(self, x: Tensor) -> tuple[Tensor, None]:
        self.away.append(x.clone())
        return self.away[-1], None

    def back(self, there: Tensor) -> tuple[Tensor, None]:
        return there.clone(), None

    def wait(self, mark: None) -> None: ...


@pytest.mark.parametrize("dropout", ["0", "0.1"])
@pytest.mark.parametrize("precision", ["32", "bf16-true"])
def test_offload_leaves_one_layers_input_here_and_those_of_the_others_in_main_memory(
    dropout: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Cloning()
    monkeypatch.setattr(transformer, "copies_of", lambda device: copies)
    words = [*SHAPE, "attention=sliding_window", "model.depth=4", f"precision={precision}"]
    words.append(OFFLOAD)
    config = compose([*words, f"model.dropout={dropout}"])
    kept, needed = kept_bytes(config), estimate(config)
    blocks = [2 ** math.ceil(math.log2(there.nbytes)) for there in copies.away]
    assert needed.main_memory == sum(blocks) and len(blocks) == (3 if dropout == "0" else 6)
    assert f" and {size(needed.main_memory)} of main memory" in str(needed)
    if dropout == "0":  # what dropout itself keeps is counted nowhere
        assert needed.activations == pytest.approx(kept, rel=0.15)
    stays = estimate(compose([*words[:-1], RECOMPUTED, f"model.dropout={dropout}"]))
    stream = copies.away[0].nbytes
    assert stays.main_memory == 0 and "main memory" not in str(stays)
    assert stays.activations - needed.activations == len(blocks) * stream  # here, not rounded up
    if dropout == "0":  # the next input comes while a layer works, which takes more than the loss of a small chunk
        here, away = (estimate(compose([*words[:-1], "model.chunk=64", way])) for way in (RECOMPUTED, words[-1]))
        assert away.working - here.working == stream


def test_offload_is_the_next_step_where_layers_inputs_are_too_much_and_main_memory_holds_them() -> None:
    given = ["attention=sliding_window", "data.context=65536", "model.depth=12", "model.chunk=1024", "optimizer=adamw"]
    config = compose([*given, "precision=32"])
    recomputed = estimate(compose([*given, "precision=32", "model.activation_checkpointing=true"]))
    offloaded = estimate(compose([*given, "precision=32", "model.activation_checkpointing=offload"]))
    assert offloaded.total < recomputed.total
    between, beside = (offloaded.total + recomputed.total) / 2, offloaded.main_memory

    def first(budget: float, main_memory: float, config: Config = config) -> str:
        return remedies(config, budget, several_devices=False, main_memory=main_memory)[0][0]

    assert first(recomputed.total, beside) == "model.activation_checkpointing=true"  # it costs less
    assert first(between, beside) == "model.activation_checkpointing=offload"
    assert "offload" not in first(between, beside - 1)
    assert "offload" not in first(between, 0)
    already = compose([*given, "precision=32", "model.activation_checkpointing=true"])
    assert first(between, beside, already) == "model.activation_checkpointing=offload"
    compiled = compose([*given, "precision=32", "compile=true"])
    assert "offload" not in first(between, beside, compiled)


def test_what_is_proposed_to_an_offloading_run_is_no_offload_and_fits_in_both_memories() -> None:
    config = compose([*SHAPE, "attention=sliding_window", "data.batch_size=4", "model.depth=4", OFFLOAD])
    needed = estimate(config)
    found = remedies(config, needed.total, several_devices=False, main_memory=needed.main_memory / 2)
    assert len(found) == 3
    for words, smaller in found:
        assert "activation_checkpointing" not in words and smaller.main_memory <= needed.main_memory / 2


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimizers_state_is_counted_exactly(optimizer: str) -> None:
    config = compose([*SHAPE, f"optimizer={optimizer}"])
    model = language_model(config, ByteTokenizer()).model
    real = config.optimizer.build(parameter_groups(model, model.layers))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    real.step()
    states = [value for state in real.state.values() for value in state.values() if isinstance(value, Tensor)]
    counted = sum(value.numel() * value.element_size() for value in states)
    assert optimizer_bytes(config, meta_model(config)) == counted


def peak_of_run(words: list[str]) -> float:
    """MiB that a short run takes above its imports; for a process of its own."""
    run.draw_plots = lambda *given: None  # type: ignore[assignment]
    run.matmul_peak = lambda *given: 1e11  # type: ignore[assignment]
    return float(run.fit(parse(compose_raw(words)))["peak_memory_mib"])


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "words", [(), ("model.activation_checkpointing=true",), ("precision=bf16-mixed",)], ids=lambda w: "".join(w)
)
def test_the_whole_is_within_a_factor_of_one_and_a_half_of_the_measured_peak(words: tuple[str, ...], tmp_path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"some text of document {i}, " * 500)
    given = [
        *("attention=sliding_window", "attention.window=128", "data=files", f"data.path='{tmp_path}/*.txt'"),
        *("data.val_fraction=0.5", "data.context=2048", "data.batch_size=2", "model=nano", "eval.tokens=2048"),
        *("eval.sample_tokens=0", "trainer.max_steps=2", "trainer.progress=false", "threads=1"),
        *(f"runs_dir={tmp_path}/runs", *words),
    ]
    measured = in_child(peak_of_run, given) * 2**20
    assert measured / 1.5 < estimate(compose(given)).total < measured * 1.5


def test_shards_and_ranks_divide_what_they_should() -> None:
    words = ["attention=sliding_window", "data.context=4096", "trainer.devices=4"]
    one = estimate(compose(words[:2]))
    ddp, fsdp = (estimate(compose([*words, f"strategy={kind}"])) for kind in ("ddp", "fsdp"))
    context = estimate(compose([*words, "strategy=context"]))
    assert ddp.weights == one.weights and ddp.gradients == 2 * one.gradients and ddp.activations == one.activations
    assert fsdp.weights == one.weights / 4 and fsdp.optimizer == one.optimizer / 4 and fsdp.working > one.working
    assert context.activations == pytest.approx(one.activations / 4, rel=0.1) and context.weights == one.weights


def test_what_is_proposed_fits_and_says_what_it_takes() -> None:
    given = ["attention=sliding_window", "data.context=4096", "data.batch_size=2"]
    config = compose(given)
    budget = 0.6 * estimate(config).total
    for several in (False, True):
        found = remedies(config, budget, several_devices=several)
        assert len(found) == 3
        for words, needed in found:
            assert estimate(compose([*given, *words.split()])) == needed and needed.total <= budget
        assert [("trainer.devices=" in words) for words, _ in found].count(True) == several


def test_the_samples_of_a_step_stay_as_they_are_in_smaller_batches() -> None:
    config = compose(
        ["precision=32", "attention=sliding_window", "data.batch_size=6", "trainer.accumulate_grad_batches=2"]
    )
    found = dict(remedies(config, 0.6 * estimate(config).total, several_devices=False))
    assert "data.batch_size=3 trainer.accumulate_grad_batches=4" in found


def test_several_settings_together_are_proposed_where_none_is_enough_alone() -> None:
    config = compose(["attention=sliding_window", "data.context=4096", "data.batch_size=4"])
    needed = estimate(config)
    found = remedies(config, needed.process + 0.08 * (needed.total - needed.process), several_devices=False)
    assert len(found) == 3
    assert (
        "model.activation_checkpointing=true data.batch_size=1 trainer.accumulate_grad_batches=4 data.context="
        in " ".join(w for w, _ in found)
    )
    assert remedies(config, 1.0, several_devices=False) == []


def test_the_estimate_reads_as_a_sum_in_words() -> None:
    needed = estimate(compose(["attention=sliding_window"]))
    assert needed.total == sum(dataclasses.astuple(needed)) and needed.main_memory == 0
    assert str(needed).startswith(size(needed.total)) and "activations" in str(needed)
    assert (size(3 * 2**20), size(2**30), size(1536 * 2**20)) == ("3 MiB", "1.0 GiB", "1.5 GiB")
