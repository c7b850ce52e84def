"""The numbers of a step: exact over micro-batches, in bits per byte of real text, and never not a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightsparse.config.schema import Config
from lightsparse.data import ByteTokenizer
from lightsparse.models.transformer import Transformer
from lightsparse.training.health import NonFiniteError
from lightsparse.training.measures.loss_sums import Totals
from lightsparse.training.module import LanguageModel

Tiny = Callable[..., Config]


class Ragged(LightningDataModule):
    """Random samples, the i-th with 1 + i · 17 mod 60 labels, in batches of any size; the same samples every time."""

    def __init__(self, batch_size: int, context: int = 64) -> None:
        super().__init__()
        self.batch_size, self.context, self.consumed = batch_size, context, 0

    def batch(self, first: int) -> dict[str, Tensor]:
        ids = torch.arange(first, first + self.batch_size)
        tokens = torch.stack([torch.arange(self.context + 1) * (7 + i % 4) % 250 for i in ids.tolist()])
        labels = tokens[:, 1:].clone()
        for row, i in enumerate(ids.tolist()):
            labels[row, 1 + i * 17 % 60 :] = -100
        return {
            "tokens": tokens[:, :-1],
            "labels": labels,
            "documents": torch.zeros(self.batch_size, self.context, dtype=torch.int32),
            "positions": torch.arange(self.context).repeat(self.batch_size, 1),
            "sample_ids": ids,
        }

    def train_dataloader(self) -> DataLoader:
        class Endless(IterableDataset):
            def __iter__(inner) -> Iterator[dict[str, Tensor]]:
                first = 0
                while True:
                    yield self.batch(first)
                    first += self.batch_size

        return DataLoader(Endless(), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.batch(first) for first in range(0, 24, self.batch_size)], batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}


class Watch(Callback):
    """The gradients of the last step, the loss of each."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        if pl_module.step_result is not None:
            self.losses.append(pl_module.step_result.totals.loss)


def module_for(config: Config) -> LanguageModel:
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = Transformer(config.model, config.attention.build, vocab_size=256, causal=config.objective == "causal")
    return LanguageModel(model, config, token_bytes=tokenizer.token_bytes(), mask_id=tokenizer.mask)


def trainer_for(config: Config, *callbacks: Callback, validate: bool = False) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulate_grad_batches,
        gradient_clip_val=config.trainer.grad_clip,
        precision=config.precision,
        num_sanity_val_steps=-1 if validate else 0,
        limit_val_batches=1.0 if validate else 0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def fitted(config: Config, data: Ragged) -> tuple[LanguageModel, Watch]:
    module, watch = module_for(config), Watch()
    trainer_for(config, watch).fit(module, datamodule=data)
    return module, watch


def test_accumulated_ragged_micro_batches_equal_one_big_batch(tiny: Tiny) -> None:
    one = tiny("trainer.max_steps=1", "trainer.grad_clip=null", "data.batch_size=4")
    four = tiny(
        "trainer.max_steps=1", "trainer.grad_clip=null", "data.batch_size=1", "trainer.accumulate_grad_batches=4"
    )
    big, big_watch = fitted(one, Ragged(4))
    small, small_watch = fitted(four, Ragged(1))
    assert big.step_result is not None and small.step_result is not None
    assert big.step_result.totals.targets == small.step_result.totals.targets == sum(1 + i * 17 % 60 for i in range(4))
    assert big.step_result.totals.loss == pytest.approx(small.step_result.totals.loss, rel=1e-6)
    assert big.step_result.grad_norm == pytest.approx(small.step_result.grad_norm, rel=1e-5)
    for name, gradient in big_watch.gradients.items():
        torch.testing.assert_close(gradient, small_watch.gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_those_of_the_mean_over_real_tokens(tiny: Tiny) -> None:
    config = tiny("trainer.max_steps=1", "trainer.grad_clip=null", "data.batch_size=4")
    _, watch = fitted(config, Ragged(4))
    module, batch = module_for(config), Ragged(4).batch(0)
    labels, _, output = module._forward(batch, key=0)
    torch.nn.functional.cross_entropy(module.model.logits(output.hidden).flatten(0, 1), labels.flatten()).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(watch.gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_consumed_counts_the_samples_of_finished_steps(tiny: Tiny) -> None:
    config = tiny("trainer.max_steps=3", "data.batch_size=2", "trainer.accumulate_grad_batches=4")
    data = Ragged(2)
    fitted(config, data)
    assert data.consumed == 3 * 2 * 4


def test_a_validation_does_not_depend_on_the_batch_size(tiny: Tiny) -> None:
    results = []
    for batch_size in (1, 4, 6):
        config = tiny(f"data.batch_size={batch_size}")
        module = module_for(config)
        trainer_for(config, validate=True).validate(module, Ragged(batch_size), verbose=False)
        results.append(module)
    first, *others = results
    assert first.validation is not None
    for other in others:
        assert other.validation is not None
        assert other.validation.targets == first.validation.targets == sum(1 + i * 17 % 60 for i in range(24))
        assert other.validation.loss == pytest.approx(first.validation.loss, rel=1e-5)


def test_positions_fall_into_their_buckets_and_the_buckets_add_up(tiny: Tiny) -> None:
    config = tiny("data.batch_size=4")
    module = module_for(config)
    trainer_for(config, validate=True).validate(module, Ragged(4), verbose=False)
    labels = torch.cat([Ragged(4).batch(first)["labels"] for first in range(0, 24, 4)])
    counts = [(labels[:, start:end] != -100).sum().item() for start, end in ((0, 16), (16, 32), (32, 64))]
    assert [part.targets for part in module.by_position] == counts
    assert module.validation is not None and module.validation.targets == sum(counts)


def test_an_untrained_model_is_near_eight_bits_per_byte(tiny: Tiny) -> None:
    config = tiny("data.batch_size=4")
    module = module_for(config)
    trainer_for(config, validate=True).validate(module, Ragged(4), verbose=False)
    assert module.validation is not None
    assert module.validation.bits_per_byte == pytest.approx(8.0, abs=0.2)


def test_bits_per_byte_counts_the_bytes_of_text_and_not_the_tokens() -> None:
    totals = Totals(nats=math.log(2) * 300, targets=120, bytes=100)
    assert totals.bits_per_byte == pytest.approx(3.0)
    assert totals.loss == pytest.approx(math.log(2) * 2.5)
    assert totals.perplexity == pytest.approx(2**2.5)


def test_the_special_tokens_stand_for_no_bytes(tiny: Tiny) -> None:
    config = tiny()
    module = module_for(config)
    labels = torch.tensor([[65, ByteTokenizer.bos, 66, -100]])
    targets, text_bytes = module._targets_and_bytes(labels)
    assert (targets.item(), text_bytes.item()) == (3, 2)


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_what_is_not_a_number_is_not_taken(
    poisoned: str, optimizer: str, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny("trainer.max_steps=5", "health.skip_steps=1", f"optimizer={optimizer}")
    module, data = module_for(config), Ragged(2)
    seen: dict[str, Tensor] = {}

    class Poison(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step in (2, 3):
                seen.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})
                if poisoned == "loss":
                    pl_module._sums[0] = math.nan
                else:
                    pl_module.model.norm.weight.grad[0] = math.inf

    trainer = trainer_for(config, Poison())
    trainer._default_root_dir = str(tmp_path)  # where the batch goes
    with pytest.raises(NonFiniteError, match=r"at step 4, after health.skip_steps=1 .*; lower optimizer\.lr"):
        trainer.fit(module, datamodule=data)
    assert all(torch.equal(value, dict(module.named_parameters())[name]) for name, value in seen.items())
    assert module.health.skipped == 2


def test_masked_tokens_are_learned_and_every_validation_hides_the_same(tiny: Tiny) -> None:
    config = tiny("objective=mlm", "trainer.max_steps=30", "data.batch_size=4", "mlm_ratio=0.3", "optimizer.lr=0.01")
    module, watch = module_for(config), Watch()
    trainer = trainer_for(config, watch, validate=True)
    trainer.validate(module, Ragged(4), verbose=False)
    before = module.validation
    trainer.validate(module, Ragged(4), verbose=False)
    assert module.validation == before
    trainer_for(config, watch).fit(module, datamodule=Ragged(4))
    assert sum(watch.losses[-5:]) < 0.95 * sum(watch.losses[:5])


def test_an_auxiliary_loss_counts_as_a_mean_whatever_the_micro_batches(tiny: Tiny) -> None:
    """An aux_loss of w has gradient 1 after the division by tokens, however many tokens there are."""
    config = tiny(
        "trainer.max_steps=1", "trainer.grad_clip=null", "data.batch_size=1", "trainer.accumulate_grad_batches=4"
    )
    module, watch = module_for(config), Watch()
    weight = module.model.norm.weight
    plain_forward = module.model.forward
    module.model.forward = lambda *args: replace(plain_forward(*args), aux_loss=weight.sum())  # type: ignore[method-assign]
    trainer_for(config, watch).fit(module, datamodule=Ragged(1))
    with_aux = watch.gradients["model.norm.weight"]
    _, without = fitted(config, Ragged(1))
    torch.testing.assert_close(with_aux - without.gradients["model.norm.weight"], torch.ones_like(weight))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_follows_fp32_at_far_positions_too(precision: str, tiny: Tiny) -> None:
    """Angles of a rotation rounded to bf16 would be off by whole turns from position 256 on."""
    far = 4096
    results = {}
    for name in ("32", precision):
        config = tiny(f"precision={name}", f"data.context={far}", "eval.tokens=4096", "data.batch_size=1")
        module = module_for(config)
        for layer in module.model.layers:  # make attention matter: sharp queries and keys
            layer.self_attn.q_proj.weight.data *= 20
            layer.self_attn.k_proj.weight.data *= 20
        plugin = trainer_for(config).precision_plugin
        module = plugin.convert_module(module)
        with plugin.val_step_context(), torch.no_grad():
            _, _, output = module._forward(Ragged(1, far).batch(0), key=0)
        results[name] = output.hidden.float()[0]
    error = (results[precision] - results["32"]).norm(dim=-1) / results["32"].norm(dim=-1)
    assert error[-512:].mean() < 0.05
    assert error[-512:].mean() < 3 * error[:512].mean()
