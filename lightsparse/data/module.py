"""The LightningDataModule: a source's samples as training and validation batches, resumable by one counter."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightsparse.data.sampler import GlobalOrderSampler
from lightsparse.data.source import DataConfig, DataError, Samples, SampleSet
from lightsparse.data.tokens import Tokenizer

Batch = dict[str, Tensor]


class DataModule(LightningDataModule):
    """Batches are dicts: tokens, labels, positions int64 [B, N], documents int32 [B, N], sample_ids int64 [B].

    Both loaders already give each rank its share: the trainer needs use_distributed_sampler=False, and, since
    training never runs out of batches, max_steps.
    Who reads what is the strategy's `distributed_sampler_kwargs`.
    `consumed` counts training samples of all ranks together. The training module sets it before a checkpoint is
    written: the loader itself has drawn a few batches ahead.
    """

    def __init__(self, config: DataConfig, seed: int, eval_tokens: int = 262_144):
        super().__init__()
        self.config, self.seed, self.eval_tokens = config, seed, eval_tokens
        self.consumed = 0

    @cached_property
    def samples(self) -> Samples:
        """Read on first use; DataError where that fails."""
        return self.config.samples(self.seed, self.eval_tokens)

    def setup(self, stage: str | None = None) -> None:
        _ = self.samples

    @property
    def tokenizer(self) -> Tokenizer:
        return self.samples.tokenizer

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that decides which tokens sample i holds: documents, tokenizer, packing."""
        return self.samples.manifest

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless batches of this rank, from `consumed` on."""
        samples = self.samples.train
        rank, world = self._rank_and_world()
        order = GlobalOrderSampler(len(samples), self.seed, start=self.consumed, rank=rank, world=world)
        return self._loader(samples, order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The first eval_tokens validation tokens in hash order; every rank gets equally many samples."""
        samples = self.samples.val
        rank, world = self._rank_and_world()
        per_rank = -(-len(samples) // world)
        return self._loader(samples, range(rank, per_rank * world, world))

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "seed": self.seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the checkpoint's sample. DataError if the order or the data itself is another one."""
        for field, here in (("fingerprint", self.fingerprint), ("seed", self.seed)):
            if state_dict[field] != here:
                raise DataError(
                    f"the checkpoint was trained on data with {field} {state_dict[field]}, this run has {here}; "
                    "restore documents, data.context, data.pack and seed (data=stdlib: the Python version too), or "
                    "start afresh with name=<another>"
                )
        self.consumed = state_dict["consumed"]

    def _rank_and_world(self) -> tuple[int, int]:
        """Of those that read different samples: ranks that hold one sequence together read the same."""
        share = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (share["rank"], share["num_replicas"]) if share else (0, 1)

    def _loader(self, samples: SampleSet, order: Iterable[int]) -> DataLoader[Batch]:
        return DataLoader(
            samples,  # type: ignore[arg-type]  # a Dataset is a class there, not a form
            batch_size=self.config.batch_size,
            sampler=order,
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: a loader would draw from the global one and shift a resumed run's
        )
