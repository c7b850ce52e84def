"""Dense attention in some steps of a run, a learned selection in the others.

A selection that is to imitate attention (DeepSeek-V3.2's indexer, SeerAttention's gate) learns from dense attention
first; a run may also end dense. Which it is follows from the optimizer step alone, so that a run that resumes, and the
evaluation of a checkpoint, are in the stage of that step. What is trained in it: trainer.selector_only_steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionShape
from lightsparse.attention.dense import DenseAttention, DenseConfig


@dataclass(frozen=True)
class StagedConfig(AttentionConfig):
    """Fields of a variant that can be dense for a while."""

    dense_steps: int = 0  # optimizer steps at the start in which attention is dense; −1 = all of them
    dense_from: int | None = None  # finished optimizer steps from which on it is dense again; null = never

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_steps < -1:
            raise ValueError(
                f"attention.dense_steps is {self.dense_steps}; it counts optimizer steps, 0 or more, and -1 is the "
                "whole run"
            )
        if self.dense_from is not None and not 0 <= self.dense_steps < self.dense_from:
            raise ValueError(
                f"attention.dense_from is {self.dense_from} and attention.dense_steps {self.dense_steps}; there must "
                "be sparse steps in between: raise dense_from, or leave it null"
            )

    def is_dense(self, step: int) -> bool:
        """Whether attention is dense in the optimizer step after `step` finished ones."""
        at_first = self.dense_steps < 0 or step < self.dense_steps
        return at_first or (self.dense_from is not None and step >= self.dense_from)


class StagedAttention(AttentionCore):
    """A core that follows such a schedule; `dense_now` says where it stands, at first before step 1.

    In the dense stage a subclass returns what `dense`, which has no parameters, gives for the same arguments.
    """

    def __init__(self, config: StagedConfig, shape: AttentionShape, block: int = 64):
        """block: tokens per block of the dense stage's tables, where it has any; see DenseConfig."""
        super().__init__(config, shape)
        self.schedule = config
        self.dense_now = config.is_dense(0)
        self.dense = DenseAttention(DenseConfig(block=block, dropout=config.dropout), shape)

    def set_step(self, step: int, max_steps: int) -> None:
        self.dense_now = self.schedule.is_dense(step)
