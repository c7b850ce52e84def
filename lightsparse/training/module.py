"""The LightningModule: loss, gradients and validation, exact over micro-batches and ranks.

Losses are sums of nats over real targets. A sum of sums divided once by the targets of the whole global step is what
one big batch would give; a mean of micro-batch means is not, when some hold fewer targets than others. So no
number depends on whether ranks hold different samples or different tokens of one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightsparse.attention.core import SequenceContext
from lightsparse.config.context_split import context_split
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.context_parallel.shard import ContextShard
from lightsparse.data.source import IGNORED
from lightsparse.data.tokens import Tokenizer
from lightsparse.distributed.environment import gather_objects
from lightsparse.distributed.strategies import GridStrategy, ReplicatedStrategy, ShardedStrategy
from lightsparse.distributed.strategy_config import ContextRanks
from lightsparse.models.transformer import ModelOutput, Transformer
from lightsparse.optim.optimizers import parameter_groups
from lightsparse.training.health import Health, NonFiniteError, replay_file, save_for_replay
from lightsparse.training.measures import attention_stats
from lightsparse.training.measures.loss_sums import StepResult, Totals
from lightsparse.training.measures.router_grad_check import RouterWatch
from lightsparse.training.measures.scores import Scores, score_sums
from lightsparse.training.objectives import Objective
from lightsparse.utils.allocator import release_freed
from lightsparse.utils.compat.torch import scale_

log = logging.getLogger(__name__)

FIRST_BUCKET = 16  # tokens; loss by position is kept for positions 0…15, 16…31, 32…63, …


def language_model(config: Config, tokenizer: Tokenizer) -> LanguageModel:
    """The freshly drawn model of a config. Raises ConfigError where its attention cannot take the model's shape."""
    if config.objective == "mlm" and tokenizer.mask is None:
        raise ConfigError(
            f"objective is mlm, and the tokenizer {tokenizer.fingerprint} has no mask token to hide others with; use "
            "tokenizer=bpe, tokenizer=bytes or one that has a mask_token"
        )
    model = Transformer(
        config.model,
        config.attention.build,
        vocab_size=tokenizer.vocab_size,
        causal=config.objective == "causal",
        context=config.data.context,
    )
    return LanguageModel(model, config, token_bytes=tokenizer.token_bytes(), mask_id=tokenizer.mask)


class LanguageModel(LightningModule):
    """Trains a Transformer on batches of the data module.

    token_bytes  int64 [vocabulary]: bytes of text behind each token
    mask_id      the token that hides others under objective=mlm
    shard        this rank's part of every sequence, from the strategy; None where one rank holds a whole one
    After each step `step_result`, after each validation `validation` (and `by_position`, from the start of the context
    to its end, and `scores` where the data asks) hold the numbers, for whoever writes them.
    """

    token_bytes: Tensor
    bucket_edges: Tensor

    def __init__(self, model: Transformer, config: Config, *, token_bytes: Tensor, mask_id: int | None) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.objective = Objective(config.objective, config.seed, mask_id, config.mlm_ratio)
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        edges = [FIRST_BUCKET << i for i in range(64) if FIRST_BUCKET << i < config.data.context]
        self.register_buffer("bucket_edges", torch.tensor(edges), persistent=False)
        self.shard: ContextShard | None = None
        self.step_result: StepResult | None = None
        self.validation: Totals | None = None
        self.by_position: list[Totals] = []
        self.scores: Scores | None = None
        self.health = Health(config.health)
        self._batches: list[Mapping[str, Tensor]] = []  # of the step under way
        self.attention_columns = attention_stats.step_columns(config)
        self.validated = 0  # optimizer steps behind the last validation
        self.choice_churn: float | None = None  # since the validation before
        self._choices: list[Tensor] = []  # what each layer chose in the first validation batch

    # ---- ranks --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Once the ranks have met: which tokens of a sequence are this rank's."""
        strategy, config = self.trainer.strategy, self.config.strategy
        split = context_split(self.config, self.model)
        if split is None:
            return
        assert isinstance(strategy, GridStrategy) and strategy.context_group is not None
        assert isinstance(config, ContextRanks)  # as there is a split
        self.shard = ContextShard(split, strategy.context_group, config.key_exchange)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self, self.model.layers)

    # ---- training -----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self.model.set_step(max(self.global_step - 1, 0), self.config.trainer.max_steps)  # a validation may come first
        self._stop_at_goal()  # it may have been reached just before the run was killed
        self._set_rate()
        # nats, targets, bytes, density, and what the attention reports of itself
        self.routers = RouterWatch(self.model.cores)
        self._sums = torch.zeros(4 + len(self.attention_columns), device=self.device, dtype=torch.float32)

    def _set_rate(self) -> None:
        """The rate of the step that comes: a checkpoint brings that of the schedule it was saved under."""
        factor = self.config.schedule.factor(self.global_step, self.config.trainer.max_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * factor

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of nats over this rank's targets in a micro-batch; `on_before_optimizer_step` divides, once."""
        self._batches.append(batch)
        self.model.set_step(self.global_step, self.config.trainer.max_steps)
        key = self.objective.training_key(self.global_step)
        labels_BN, _, output = self._forward(batch, key)
        nats = self.model.loss_sum(output.hidden, labels_BN)
        targets, text_bytes = self._targets_and_bytes(labels_BN)
        sums = [value.detach().float() for value in (nats, targets, text_bytes, output.stats["density"])]
        self._sums += torch.cat(
            [torch.stack(sums), attention_stats.step_values(self.config, output.stats, self.device)]
        )
        # An auxiliary loss is a mean; weighed by the targets it stays one after the division.
        return nats if output.aux_loss is None else nats + output.aux_loss * targets

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the targets of the whole global step.

        Lightning has divided each micro-batch's loss by `accumulate`, DDP and FSDP2 the gradients by the number of
        ranks, whether those hold different samples or parts of one.
        """
        if len(self._batches) != self.config.accumulate_grad_batches:
            raise ConfigError(
                f"step {self.global_step + 1} has accumulated {len(self._batches)} micro-batches and "
                f"trainer.accumulate_grad_batches is {self.config.accumulate_grad_batches}; one of `callbacks` has "
                "changed that, and the samples consumed could not be counted: leave it out"
            )
        micro_batches = self.config.accumulate_grad_batches * self.trainer.world_size
        nats, targets, text_bytes, density, *reports = self._over_ranks(self._sums).tolist()
        self._sums.zero_()
        self.routers.look(self._over_ranks)
        if self.config.trainer.trains_only_selection(self.global_step):
            self._freeze_all_but_selection()
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        scale_(gradients, micro_batches / max(targets, 1.0))
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)  # of shards: over all ranks
        totals = Totals(nats, targets, text_bytes)
        objection = self.health.objection(totals.loss if targets else 0.0, norm)
        if objection is not None:
            self._leave_out(objection)
        self._batches.clear()
        self.step_result = StepResult(
            objection is None,
            totals,
            density / micro_batches,
            norm,
            optimizer.param_groups[0]["lr"],
            {name: value / micro_batches for name, value in zip(self.attention_columns, reports, strict=True)},
        )
        # All samples up to here are in these gradients: whoever saves a checkpoint from now on saves that number.
        samples = (self.global_step + 1) * self.config.samples_per_step
        self.trainer.datamodule.consumed = samples  # type: ignore[attr-defined]

    def _freeze_all_but_selection(self) -> None:
        """For this step: without a gradient a parameter neither moves nor decays, and has no momentum.

        Not by requires_grad: DDP and FSDP2 wait for the gradients that they saw when they were built.
        """
        selecting = {id(parameter) for parameter in self.model.selector_parameters()}
        for parameter in self.parameters():
            if id(parameter) not in selecting:
                parameter.grad = None

    def _leave_out(self, objection: str) -> None:
        """Without gradients the optimizer changes nothing. Raises NonFiniteError when that is once too often."""
        step, strategy = self.global_step + 1, self.trainer.strategy
        for parameter in self.parameters():
            parameter.grad = None
        if isinstance(strategy, ReplicatedStrategy) and strategy.hook is not None:
            strategy.hook[0].forget_non_finite()
        if not self.health.is_over:
            log.warning("step %d is skipped: %s", step, objection)
            return
        weights = strategy.gathered_weights() if isinstance(strategy, ShardedStrategy) else self.state_dict()
        batches = [dict(batch) for batch in self._batches]
        content = {"step": step, "reason": objection, "batches": batches}
        if self.global_rank == 0:
            content["state_dict"] = weights
        path = replay_file(Path(self.trainer.default_root_dir), step, self.global_rank)
        save_for_replay(path, content)
        strategy.barrier()  # a rank that has ended would have the others ended before they have written
        raise NonFiniteError(
            f"{objection} at step {step}, after health.skip_steps={self.config.health.skip_steps} skipped steps in a "
            "row; lower optimizer.lr, lengthen schedule.warmup_steps or set trainer.grad_clip "
            f"(lightsparse replay file={path} shows where it arises)"
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step >= self.config.trainer.max_steps:
            self.trainer.should_stop = True  # before it stops Lightning validates once more, whatever the interval

    def configure_optimizers(self) -> Any:
        optimizer = self.config.optimizer.build(parameter_groups(self.model, self.model.layers))
        schedule, max_steps = self.config.schedule, self.config.trainer.max_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- validation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        release_freed()
        # Fp64 on the CPU: sums over a whole validation set are too long for fp32, and not every device has fp64.
        self._overlaps: Tensor | None = None
        self._buckets = torch.zeros(len(self.bucket_edges) + 1, 3, dtype=torch.float64)
        self._score_sums = torch.zeros(4, dtype=torch.float64)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        labels_BN, positions_BN, output = self._forward(batch, self.objective.validation_key())
        if batch_idx == 0:  # the same text at every validation
            self._overlaps = attention_stats.overlaps(self._choices, output.choices)
            self._choices = output.choices
        nats_BN = self.model.token_losses(output.hidden, labels_BN).float()
        counts_BN = labels_BN != IGNORED
        bytes_BN = self.token_bytes[labels_BN.clamp(min=0)] * counts_BN
        bucket_BN = torch.bucketize(positions_BN.contiguous(), self.bucket_edges, right=True)
        for column, value_BN in enumerate((nats_BN, counts_BN, bytes_BN)):
            sums = torch.zeros(len(self._buckets), device=self.device, dtype=torch.float32)
            sums.index_add_(0, bucket_BN.flatten(), value_BN.flatten().float())
            self._buckets[:, column] += sums.cpu()
        if self.config.data.has_answers:
            self._score_sums += score_sums(self.model, output.hidden, labels_BN, self.shard).cpu()

    def on_validation_epoch_end(self) -> None:
        release_freed()
        buckets = self._over_ranks(self._buckets.to(self.device, torch.float32)).double().cpu()
        self.choice_churn = None if self._overlaps is None else attention_stats.churn(self._over_ranks(self._overlaps))
        self.by_position = [Totals(*row) for row in buckets.tolist()]
        self.validation, self.validated = Totals(*buckets.sum(0).tolist()), self.global_step
        # For a user's callbacks (EarlyStopping, ModelCheckpoint); equal on all ranks already.
        values = {"val_loss": self.validation.loss, "val_bits_per_byte": self.validation.bits_per_byte}
        if self.config.data.has_answers:
            sums = self._over_ranks(self._score_sums.to(self.device, torch.float32))
            self.scores = Scores(*sums.tolist())
            values |= self.scores.row
            self._stop_at_goal()
        self.log_dict(values, logger=False, sync_dist=True)

    def _stop_at_goal(self) -> None:
        """End the training at the accuracy that is enough; the checkpoint callback saves this step as the last."""
        goal = self.config.eval.stop_accuracy
        if goal is not None and self.scores is not None and self.scores.accuracy >= goal and self.global_step > 0:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["health"] = self.health.state_dict()
        checkpoint["validation"] = [[part.nats, part.targets, part.bytes] for part in self.by_position]
        checkpoint["validated"] = self.validated
        checkpoint["scores"] = None if self.scores is None else list(astuple(self.scores))
        if self.config.attention.core.selects_from_input:  # the next validation compares its choices with these
            checkpoint["choices"] = gather_objects([table.cpu() for table in self._choices])
        strategy = self.trainer.strategy
        if isinstance(strategy, ReplicatedStrategy) and strategy.hook is not None:
            checkpoint["residuals"] = strategy.residuals(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.health.load_state_dict(checkpoint["health"])
        self.by_position = [Totals(*part) for part in checkpoint["validation"]]
        sums = [sum(column) for column in zip(*checkpoint["validation"], strict=True)]
        self.validation, self.validated = Totals(*sums) if sums else None, checkpoint["validated"]
        scores = checkpoint.get("scores")
        self.scores = None if scores is None else Scores(*scores)
        choices = checkpoint.get("choices", [])
        if len(choices) == self.trainer.world_size:  # else the ranks had other rows: nothing to compare with
            self._choices = [table.to(self.device) for table in choices[self.global_rank]]
        strategy = self.trainer.strategy
        if isinstance(strategy, ReplicatedStrategy) and strategy.hook is not None:
            strategy.load_residuals(checkpoint["residuals"], self)

    # ---- both ---------------------------------------------------------------------------------------------------

    def _forward(self, batch: Mapping[str, Tensor], key: int) -> tuple[Tensor, Tensor, ModelOutput]:
        """Labels and positions, int64 [B, n], and the output, of this rank's n tokens of the batch."""
        tokens_BN, labels_BN = self.objective.inputs_and_labels(batch, key)  # of whole samples: mlm hides by place
        positions_BN = batch["positions"]
        if self.shard is not None:
            tokens_BN, labels_BN, positions_BN = map(self.shard.take, (tokens_BN, labels_BN, positions_BN))
        isolated = self.config.data.isolated
        ctx = SequenceContext(
            positions=positions_BN if isolated else positions_BN[:1],
            documents=batch["documents"] if isolated else None,  # one document: cores build one layout for all samples
            seed=key,
            sample_ids=batch["sample_ids"],
            shard=self.shard,
        )
        return labels_BN, positions_BN, self.model(tokens_BN, ctx)

    def _targets_and_bytes(self, labels_BN: Tensor) -> tuple[Tensor, Tensor]:
        counts_BN = labels_BN != IGNORED
        return counts_BN.sum(), (self.token_bytes[labels_BN.clamp(min=0)] * counts_BN).sum()

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
