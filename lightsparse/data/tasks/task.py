"""What all tasks share: examples with answers, as samples that are a pure function of (seed, split, index)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightsparse.data.source import IGNORED, DataConfig, Samples
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.symbols import SymbolTokenizer
from lightsparse.data.tokens import Tokenizer

TRAIN, VAL = 0, 1  # splits: streams of draws that never meet
_KEPT = 1 << 28  # bytes of examples that a set keeps once drawn


@dataclass(frozen=True)
class Example:
    """One text with questions. All int64 [N], N = data.context.

    tokens    what the model reads
    labels    what should follow each token, IGNORED where nothing is known to
    evidence  at an answer: tokens from the one that predicts it back to the farthest token that it needs; −1 elsewhere
    """

    tokens: np.ndarray
    labels: np.ndarray
    evidence: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TaskConfig(DataConfig):
    """What every task has. A task adds its own fields and makes `example`."""

    examples: int = 100_000  # of the training set; each epoch gives the same ones
    loss: Literal["answer", "all"] = "answer"  # trained on: the answers alone, or every next token; scored are answers

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples < 1:
            raise ValueError(f"data.examples is {self.examples}; it counts training examples and must be at least 1")
        if self.loss not in ("answer", "all"):
            raise ValueError(f"data.loss is {self.loss!r}; it must be answer (answers alone) or all (every next token)")

    @property
    def has_answers(self) -> bool:
        return True

    def build_tokenizer(self) -> Tokenizer:
        return SymbolTokenizer(self.vocab_size)

    def example(self, draws: Draws) -> Example:
        """One example of data.context tokens, from nothing but these draws."""
        raise NotImplementedError(f"{type(self).__name__} has no examples")

    def training_example(self, draws: Draws) -> Example:
        """One of the examples to train on: as those to score, unless a task makes some of them easier."""
        return self.example(draws)

    def samples(self, seed: int, eval_tokens: int) -> Samples:
        """`examples` to train on, eval_tokens // context others to score."""
        named = replace(self, batch_size=1, num_workers=0)
        manifest = hashlib.blake2b(repr((type(self).__name__, named, seed)).encode(), digest_size=8).hexdigest()
        train = TaskSamples(self, seed, TRAIN, self.examples)
        val = TaskSamples(self, seed, VAL, max(1, eval_tokens // self.context))
        train.at(0), val.at(0)  # what does not fit into the context is said now
        return Samples(
            train,
            val,
            self.build_tokenizer(),
            manifest,
            self.examples * self.context,
        )


class TaskSamples(Dataset[dict[str, Tensor]]):
    """`count` examples of a split. Training ids repeat them epoch after epoch; scoring ids past the end ask nothing."""

    def __init__(self, task: TaskConfig, seed: int, split: int, count: int):
        self.task, self.seed, self.split, self.count = task, seed, split, count
        self._keeps = count * task.context * 24 <= _KEPT
        self._drawn: dict[int, Example] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, sample_id: int) -> dict[str, Tensor]:
        """tokens, labels, positions, evidence int64 [N], documents int32 [N], sample_ids int64 []."""
        example = self.at(sample_id % self.count)
        labels = example.labels
        if self.split == VAL and sample_id >= self.count:
            labels = np.full_like(labels, IGNORED)
        elif self.split == VAL or self.task.loss == "answer":
            labels = np.where(example.evidence >= 0, labels, IGNORED)
        return {  # copies: a kept example must stay as it is
            "tokens": torch.tensor(example.tokens),
            "labels": torch.tensor(labels),
            "evidence": torch.tensor(example.evidence),
            "documents": torch.zeros(len(labels), dtype=torch.int32),
            "positions": torch.arange(len(labels)),
            "sample_ids": torch.tensor(sample_id),
        }

    def at(self, index: int) -> Example:
        example = self._drawn.get(index)
        if example is None:
            make = self.task.training_example if self.split == TRAIN else self.task.example
            example = make(Draws(self.seed, self.split, index))
            if self._keeps:
                self._drawn[index] = example
        return example


def no_labels(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and evidence of a text without questions, int64 [length] each."""
    return np.full(length, IGNORED, dtype=np.int64), np.full(length, -1, dtype=np.int64)
