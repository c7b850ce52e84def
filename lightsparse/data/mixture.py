"""Several sources in one run, mixed by weights: a sample id alone says which source it comes from, and which of its.

Ids are dealt out evenly: of the first n, each source has its share of n to within the number of sources. So the counter
that resumes a run resumes its mixture, on any number of ranks. A source that is used up begins its next epoch by
itself, long before or after the others; one epoch of the mixture has as many samples as all sources together.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightsparse.data.errors import DataError
from lightsparse.data.source import DataConfig, Samples, SampleSet
from lightsparse.data.text import PackedConfig, TextConfig
from lightsparse.data.tokenizer import Bytes, Given, TokenizerConfig
from lightsparse.data.tokens import Tokenizer

log = logging.getLogger(__name__)

UNIT = 1 << 32  # weights are rounded to so many parts, and all else is exact


@dataclass(frozen=True, kw_only=True)
class MixtureData(DataConfig):
    """Sources take context, batch_size, num_workers, pack and the tokenizer from here; the rest is their own."""

    pack: Literal["isolate", "concat"] = "isolate"  # may a token see the document packed before its own: no | yes
    sources: dict[str, DataConfig] = field(default_factory=dict)  # by name
    weights: dict[str, float] = field(default_factory=dict)  # share of the samples by the same names, of any sum
    tokenizer: TokenizerConfig = field(default=Bytes(), metadata={"key": False})  # the choice tokenizer=…

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ValueError(
                "data.sources is empty; add some, as in data=mixture +data@data.sources.code=stdlib "
                "'+data.weights={code: 1}'"
            )
        if self.weights.keys() != self.sources.keys() or min(self.weights.values()) <= 0:
            raise ValueError(
                f"data.weights is {self.weights}; it must give each of {', '.join(self.sources)} a number above 0"
            )

        rules: dict[Hashable, tuple[str, object]] = {}
        for name, source in self.sources.items():
            for text, rule in (source.held_out_by() if isinstance(source, TextConfig) else {}).items():
                other, its = rules.setdefault(text, (name, rule))
                if its != rule:
                    raise ValueError(
                        f"data.sources.{other} and data.sources.{name} share text such as {text} and hold out other "
                        "parts of it; validation text must not be trained on, so give both the same path, val_path and "
                        "val_fraction, or name them apart"
                    )

    @property
    def parts(self) -> dict[str, DataConfig]:
        """The sources under the settings of the mixture."""
        return {name: self._part(source) for name, source in self.sources.items()}

    def _part(self, source: DataConfig) -> DataConfig:
        part = replace(source, context=self.context, batch_size=self.batch_size, num_workers=self.num_workers)
        if isinstance(part, PackedConfig):
            part = replace(part, pack=self.pack)
        return replace(part, tokenizer=self.tokenizer) if isinstance(part, TextConfig) else part

    @property
    def vocab_size(self) -> int:
        sizes = {name: part.vocab_size for name, part in self.parts.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"data.sources have vocabularies of different sizes, {sizes}; a model has one")
        return next(iter(sizes.values()))

    @property
    def isolated(self) -> bool:
        return any(part.isolated for part in self.parts.values())

    def choose_tokenizer(self, tokenizer: TokenizerConfig) -> MixtureData:
        for part in self.sources.values():
            part.choose_tokenizer(tokenizer)  # raises where one of them can't
        return replace(self, tokenizer=tokenizer)

    def build_tokenizer(self) -> Tokenizer:
        """One for all; one that is trained reads each source's text by its weight."""
        texts = {name: part for name, part in self.parts.items() if isinstance(part, TextConfig)}
        if not texts:
            return next(iter(self.parts.values())).build_tokenizer()
        total = sum(self.weights[name] for name in texts)

        def training_text(characters: int) -> Iterator[str]:
            for name, part in texts.items():
                yield from part.training_text(round(characters * self.weights[name] / total))

        return self.tokenizer.build(training_text)

    def with_tokenizer(self, tokenizer: Tokenizer) -> MixtureData:
        return replace(self, tokenizer=Given(tokenizer=tokenizer))

    def samples(self, seed: int, eval_tokens: int) -> Samples:
        """Training samples mixed; of each source's validation its share of eval_tokens, one source after the other."""
        tokenizer = self.build_tokenizer()
        total = sum(self.weights.values())
        read: dict[str, Samples] = {}
        for name, part in self.with_tokenizer(tokenizer).parts.items():
            log.info("data: %s, %.3g of the samples", name, self.weights[name] / total)
            read[name] = part.samples(seed, max(self.context, round(eval_tokens * self.weights[name] / total)))
            if read[name].tokenizer.fingerprint != tokenizer.fingerprint:
                raise DataError(
                    f"data.sources.{name} has the tokenizer {read[name].tokenizer.fingerprint}, others have "
                    f"{tokenizer.fingerprint}; prepare them with the same one"
                )
        weights = [self.weights[name] for name in read]
        state = repr([(name, self.weights[name], samples.manifest) for name, samples in read.items()])
        return Samples(
            MixedSamples([samples.train for samples in read.values()], weights),
            ChainedSamples([samples.val for samples in read.values()]),
            tokenizer,
            hashlib.blake2b(state.encode(), digest_size=8).hexdigest(),
            sum(samples.train_tokens for samples in read.values()),
        )


class MixedSamples:
    """Training samples of several sets; see the top of the file."""

    def __init__(self, sets: Sequence[SampleSet], weights: Sequence[float]):
        self.sets = sets
        self._parts = [max(1, round(UNIT * weight / sum(weights))) for weight in weights]

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def place(self, sample_id: int) -> tuple[int, int]:
        """Number of the set, and the sample's id in it: how many of the ids before went there.

        The first set takes an id when its share of them reaches the next whole number; the next set does the same with
        the ids that are left, and so on.
        """
        left, rest = sample_id, sum(self._parts)
        for number, part in enumerate(self._parts):
            taken = left * part // rest
            if (left + 1) * part // rest > taken:
                return number, taken
            left, rest = left - taken, rest - part
        raise AssertionError("the last set takes every id that reaches it")

    def __getitem__(self, sample_id: int) -> dict[str, Tensor]:
        number, own_id = self.place(sample_id)
        return _renamed(self.sets[number][own_id], sample_id)


class ChainedSamples:
    """Validation samples of several sets, one after the other; past the end those of the last, which count nothing."""

    def __init__(self, sets: Sequence[SampleSet]):
        self.sets = sets
        self._ends = np.cumsum([len(each) for each in sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = min(int(np.searchsorted(self._ends, index, side="right")), len(self.sets) - 1)
        before = int(self._ends[number - 1]) if number else 0
        return _renamed(self.sets[number][index - before], index)


def _renamed(sample: Mapping[str, Tensor], sample_id: int) -> dict[str, Tensor]:
    """Under an id that no other source's sample has: masks and dropout depend on it."""
    return {**sample, "sample_ids": torch.tensor(sample_id)}
