"""The model under evaluation: ours, or any causal language model of transformers, behind three methods.

Shapes: B texts, N tokens, T asked tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightsparse.models.generation import Generation
from lightsparse.models.sampling import GREEDY
from lightsparse.models.transformer import Transformer, context_for

IGNORED = -100


class Subject(Protocol):
    """Tokens are int64; everything runs without gradient, in evaluation mode."""

    @property
    def vocab_size(self) -> int:
        """Ids it can read."""

    @property
    def longest(self) -> int | None:
        """Tokens it can read at most, where there is such a limit."""

    def logits(self, tokens_BN: Tensor, asked_BN: Tensor) -> Tensor:
        """Of the token after each asked one (bool [B, N]): fp32 [T, V], row after row."""

    def losses(self, tokens_BN: Tensor, labels_BN: Tensor) -> Tensor:
        """−log p(label) in nats, 0 where it is IGNORED: fp32 [B, N]."""

    def generate(self, tokens_N: Tensor, count: int) -> list[int]:
        """The likeliest continuation, token by token: `count` ids."""


class OwnModel:
    """A Transformer of ours."""

    def __init__(self, model: Transformer):
        self.model = model

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def longest(self) -> int | None:
        learned = self.model.embed_positions
        return None if learned is None else learned.num_embeddings

    def logits(self, tokens_BN: Tensor, asked_BN: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.logits(self._hidden(tokens_BN)[asked_BN.to(self._device)]).float()

    def losses(self, tokens_BN: Tensor, labels_BN: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.token_losses(self._hidden(tokens_BN), labels_BN.to(self._device))

    def generate(self, tokens_N: Tensor, count: int) -> list[int]:
        steps = Generation(self.model, tokens_N[None], count, sampling=GREEDY)
        return [token for (token,) in steps if token is not None]

    def _hidden(self, tokens_BN: Tensor) -> Tensor:
        tokens_BN = tokens_BN.to(self._device)
        was_training = self.model.training
        self.model.eval()
        try:
            return self.model(tokens_BN, context_for(tokens_BN)).hidden
        finally:
            self.model.train(was_training)

    @property
    def _device(self) -> torch.device:
        return self.model.head_weight.device


class HuggingFaceModel:
    """A causal model of transformers, such as AutoModelForCausalLM gives. All logits of a batch exist at once."""

    def __init__(self, model: nn.Module):
        self.model: Any = model.eval()

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def longest(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    def logits(self, tokens_BN: Tensor, asked_BN: Tensor) -> Tensor:
        with torch.no_grad():
            return self._all(tokens_BN)[asked_BN.to(self.model.device)].float()

    def losses(self, tokens_BN: Tensor, labels_BN: Tensor) -> Tensor:
        with torch.no_grad():
            logits_BVN = self._all(tokens_BN).float().transpose(1, 2)
            return nn.functional.cross_entropy(
                logits_BVN, labels_BN.to(self.model.device), ignore_index=IGNORED, reduction="none"
            )

    def generate(self, tokens_N: Tensor, count: int) -> list[int]:
        prompt = tokens_N[None].to(self.model.device)
        with torch.no_grad():
            written = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return written[0, prompt.shape[1] :].tolist()

    def _all(self, tokens_BN: Tensor) -> Tensor:
        return self.model(input_ids=tokens_BN.to(self.model.device)).logits
