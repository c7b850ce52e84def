"""What a run asks of its data, whether text or a task: a frozen config that makes two sets of samples and their words.

A sample is a dict: tokens, labels, positions int64 [N], documents int32 [N], sample_ids int64 []. Label IGNORED does
not count. Training samples are asked for by sample id = epoch · len + index, so that a source may draw new ones for
every epoch, or give the same again; either way an id names one sample for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightsparse.data.errors import DataError as DataError
from lightsparse.data.tokenizer import Bytes, Own, TokenizerConfig
from lightsparse.data.tokens import ByteTokenizer, Tokenizer

IGNORED = -100  # label of a token that does not count in the loss


class SampleSet(Protocol):
    def __len__(self) -> int:
        """Samples of one epoch."""

    def __getitem__(self, sample_id: int) -> dict[str, Tensor]:
        """The sample of that id; a pure function of it."""


@dataclass(frozen=True)
class Samples:
    """What a source gives, read and checked."""

    train: SampleSet
    val: SampleSet  # of an epoch; past its end every label is IGNORED, so that ranks can take equally many
    tokenizer: Tokenizer
    manifest: str  # hex digits over everything that decides which tokens sample i holds
    train_tokens: int  # of one epoch


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fields every source has. A source adds its own and makes `samples`.

    Raises ValueError for a value out of range, naming the field.
    """

    context: int = 4096  # tokens per sample
    batch_size: int = 1  # samples per micro-batch and rank
    num_workers: int = 0  # loader processes per rank; 0 = in the training process

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"data.context is {self.context}; a context counts tokens and must be at least 1")
        if self.batch_size < 1:
            raise ValueError(
                f"data.batch_size is {self.batch_size}; it counts samples per micro-batch and must be at least 1"
            )
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}; it counts processes and must be at least 0")

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 … vocab_size − 1; known without reading anything."""
        return ByteTokenizer.vocab_size

    def choose_tokenizer(self, tokenizer: TokenizerConfig) -> DataConfig:
        """The same data under the choice tokenizer=…; ValueError where it brings its own."""
        if not isinstance(tokenizer, Bytes | Own):
            raise ValueError(
                f"tokenizer is {type(tokenizer).__name__}, but {type(self).__name__} brings its own; leave it out"
            )
        return self

    def build_tokenizer(self) -> Tokenizer:
        """The tokenizer of the samples; reads what it has to be trained on, if anything."""
        return ByteTokenizer()

    def with_tokenizer(self, tokenizer: Tokenizer) -> DataConfig:
        """The same data under a tokenizer that `build_tokenizer` has made before."""
        return self

    @property
    def isolated(self) -> bool:
        """Whether a sample may hold several documents that must not see each other."""
        return False

    @property
    def has_answers(self) -> bool:
        """Whether validation labels are answers to questions, right or wrong, each sample all of them or not."""
        return False

    def samples(self, seed: int, eval_tokens: int) -> Samples:
        """Both sets. Reads what has to be read; DataError where that fails.

        seed         of the run; for sources that draw their samples
        eval_tokens  validation tokens, in the source's order
        """
        raise NotImplementedError(f"{type(self).__name__} has no samples")
