"""What the model is asked to predict: the next token (causal) or hidden ones (mlm).

All randomness here is a hash of numbers that name the batch. No generator is consumed, so a run that resumes, or has
another number of ranks, hides the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightsparse.data.source import IGNORED
from lightsparse.utils.hashing import chain, mixed, uniform


@dataclass(frozen=True)
class Objective:
    """Inputs and labels of a batch.

    causal  predict each next token; the data module's own labels
    mlm     hide a share of the tokens behind `mask_id` and predict those (Devlin et al. 2019, arXiv 1810.04805, without
            the random and kept tokens); the model must be bidirectional
    """

    name: Literal["causal", "mlm"]
    seed: int
    mask_id: int | None  # None: the tokenizer has none, which `causal` does not need
    mlm_ratio: float = 0.15  # share of tokens hidden; mlm only

    def inputs_and_labels(self, batch: Mapping[str, Tensor], key: int) -> tuple[Tensor, Tensor]:
        """Tokens to read and labels to score, both int64 [B, N], labels IGNORED where nothing is asked.

        key  names this look at the samples (`training_key`, `validation_key`); the hidden tokens depend on it, on the
             global id of the sample and on the place in it, not on the batch around it
        """
        tokens_BN = batch["tokens"]
        if self.name == "causal":
            return tokens_BN, batch["labels"]
        assert self.mask_id is not None  # as training has checked
        hidden_BN = hiding_chance(key, batch["sample_ids"], tokens_BN.shape[1]) < self.mlm_ratio
        asked_BN = hidden_BN & (batch["labels"] != IGNORED)  # a validation token scored in another sample
        return tokens_BN.masked_fill(hidden_BN, self.mask_id), tokens_BN.masked_fill(~asked_BN, IGNORED)

    def training_key(self, step: int) -> int:
        """The randomness key of an optimizer step: a function of (run seed, global step).

        Not of the micro-batch: sample ids are unique in a run, and a sample keeps its randomness wherever it is put.
        """
        return mixed(self.seed, 0, step)

    def validation_key(self) -> int:
        """The same key for every validation, so that its losses can be compared."""
        return mixed(self.seed, 1)


def hiding_chance(key: int, sample_ids_B: Tensor, length: int) -> Tensor:
    """Fp32 [B, length] in [0, 1): a hash of (key, sample id, place)."""
    place_N = torch.arange(length, device=sample_ids_B.device)
    return uniform(chain(key, sample_ids_B[:, None], place_N))
