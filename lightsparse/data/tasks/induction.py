"""Induction heads: a special symbol stands once in a random text, and at its end: what followed it the first time?

Fu et al. 2023 (H3), arXiv 2212.14052, section 3.1: vocabulary 20, length 30. Gu & Dao 2023 (Mamba), arXiv 2312.00752,
table 11: vocabulary 16, trained at 256, tested at up to a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.task import Example, TaskConfig, no_labels


@dataclass(frozen=True, kw_only=True)
class InductionHead(TaskConfig):
    """data.context tokens, the last id of the vocabulary is the special one; asked is the last label."""

    context: int = 30
    batch_size: int = 32
    examples: int = 5000
    loss: Literal["answer", "all"] = "all"
    vocabulary: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 2:
            raise ValueError(f"data.vocabulary is {self.vocabulary}; a symbol and the special one need at least 2")
        if self.context < 3:
            raise ValueError(f"data.context is {self.context}; symbol, answer and question need at least 3 tokens")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def example(self, draws: Draws) -> Example:
        special = self.vocabulary - 1
        tokens = draws.below(special, self.context)
        first = draws.one_below(self.context - 2)
        tokens[first] = tokens[-1] = special
        labels, evidence = no_labels(self.context)
        labels[:-1], labels[-1] = tokens[1:], tokens[first + 1]
        evidence[-1] = self.context - 1 - first
        return Example(tokens, labels, evidence)
