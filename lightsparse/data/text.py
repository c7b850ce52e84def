"""Text as data: documents, tokenized into two streams, cut into samples of one context."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lightsparse.data.corpus import Corpus, DocumentSelection, select
from lightsparse.data.documents import Document, divided, is_held_out
from lightsparse.data.encoding import encode_in_memory
from lightsparse.data.errors import DataError
from lightsparse.data.packing import EvaluationSamples, PackedSamples
from lightsparse.data.packing_plan import PlannedSamples, best_fit_plan, sequential_plan
from lightsparse.data.prepare import cached
from lightsparse.data.shards import Manifest, ShardedTokens
from lightsparse.data.source import DataConfig, Samples, SampleSet
from lightsparse.data.text_chunks import cut
from lightsparse.data.tokenizer import Bytes, Given, Own, TokenizerConfig
from lightsparse.data.tokens import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackedConfig(DataConfig):
    """What every source of documents has, however it is tokenized: which are used, and how they become samples."""

    pack: Literal["isolate", "concat"] = "isolate"  # may a token see the document packed before its own: no | yes
    val_fraction: float = 0.05  # chance of a document to be held out; unused where the source names its own validation
    order: Literal["sequential", "best_fit"] = "sequential"  # best_fit: no document of up to a context is cut; pads
    align: int = 1  # documents start at multiples of so many tokens; above 1 pads
    min_tokens: int = 0  # documents with fewer are left out
    max_tokens: int | None = None  # documents with more are left out; null = no limit

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack not in ("isolate", "concat"):
            raise ValueError(f"data.pack is {self.pack!r}; it must be isolate (documents apart) or concat (one stream)")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction is {self.val_fraction}; it is a share and must lie in (0, 1)")
        if self.order not in ("sequential", "best_fit"):
            raise ValueError(f"data.order is {self.order!r}; it must be sequential (cut anywhere) or best_fit")
        if self.align < 1 or self.context % self.align:
            raise ValueError(
                f"data.align is {self.align}; it counts tokens and must divide data.context={self.context}, 1 is none"
            )
        if self.pack == "concat" and (self.order == "best_fit" or self.align > 1):
            raise ValueError(
                "data.pack is concat, one stream without padding; data.order=best_fit and data.align need isolate"
            )
        if self.min_tokens < 0:
            raise ValueError(f"data.min_tokens is {self.min_tokens}; it counts tokens of a document, at least 0")
        if self.max_tokens is not None and self.max_tokens < max(1, self.min_tokens):
            raise ValueError(
                f"data.max_tokens is {self.max_tokens}; it counts tokens of a document and must be at least "
                f"{max(1, self.min_tokens)} (data.min_tokens), or null for no limit"
            )

    @property
    def isolated(self) -> bool:
        return self.pack == "isolate"

    @property
    def selection(self) -> DocumentSelection:
        return DocumentSelection(val_fraction=self.val_fraction, min_tokens=self.min_tokens, max_tokens=self.max_tokens)

    def samples_of(self, manifest: Manifest, tokenizer: Tokenizer, eval_tokens: int) -> Samples:
        """The samples of prepared shards."""
        if manifest.tokenizer != tokenizer.fingerprint:
            raise DataError(
                f"{manifest.folder} was tokenized by {manifest.tokenizer}, but its tokenizer.json is "
                f"{tokenizer.fingerprint}; prepare it again"
            )
        tokens, entries = ShardedTokens(manifest), manifest.entries()
        corpus = select(tokens, entries, self.selection, context=self.context, empty=manifest.empty_documents)
        return self.packed(corpus, tokenizer, eval_tokens)

    def packed(self, corpus: Corpus, tokenizer: Tokenizer, eval_tokens: int) -> Samples:
        """The corpus cut into samples."""
        packing = (self.context, tokenizer.bos, self.isolated)
        train: SampleSet = PackedSamples(corpus.train, *packing)
        val: SampleSet = EvaluationSamples(corpus.val, *packing, limit=eval_tokens)
        if self.align > 1:
            plan = sequential_plan(corpus.val.lengths, self.context, self.align)
            val = PlannedSamples(corpus.val, plan, self.context, tokenizer.bos, limit=eval_tokens)
        if self.align > 1 or self.order == "best_fit":
            planned = best_fit_plan if self.order == "best_fit" else sequential_plan
            plan = planned(corpus.train.lengths, self.context, self.align)
            train = PlannedSamples(corpus.train, plan, self.context, tokenizer.bos)
            fill = plan.tokens / (len(plan) * self.context)
            log.info("data: %d samples, fill rate %.4f (the rest is padding)", len(plan), fill)
        packed = (self.context, self.pack, self.order, self.align)
        return Samples(
            train, val, tokenizer, _digest(corpus.manifest, tokenizer.fingerprint, *packed), len(corpus.train)
        )


@dataclass(frozen=True, kw_only=True)
class TextConfig(PackedConfig):
    """What every source of text has. A source adds its own and yields `documents()`."""

    tokenizer: TokenizerConfig = field(default=Bytes(), metadata={"key": False})  # the choice tokenizer=…
    cache: str | None = None  # folder for tokens as memory-mapped shards, one folder per text in it; null = in memory

    def documents(self) -> Iterator[Document]:
        """Every document of the source, in an order that stays; DataError where the source cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} has no documents")

    def documents_after(self, skip: int) -> Iterator[Document]:
        """The documents without the first `skip`."""
        return islice(self.documents(), skip, None)

    def identity(self) -> dict[str, Any]:
        """All that decides which documents there are; sources add what they can say of the texts themselves."""
        common = {each.name for each in fields(TextConfig)}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in common}

    def held_out_by(self) -> dict[Hashable, object]:
        """Of each file or part that others may read, too: what decides which of its text is for validation."""
        return {}

    def text_bytes(self) -> int | None:
        """Bytes of text in all documents, where that is known without reading them; for progress bars."""
        return None

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.size()

    def choose_tokenizer(self, tokenizer: TokenizerConfig) -> TextConfig:
        if isinstance(tokenizer, Own):
            raise ValueError(f"tokenizer is own, but {type(self).__name__} brings none; use tokenizer=bytes, bpe or hf")
        return replace(self, tokenizer=tokenizer)

    def build_tokenizer(self) -> Tokenizer:
        """The tokenizer; one that is trained reads documents that are not held out, whatever their length."""
        return self.tokenizer.build(self.training_text)

    def with_tokenizer(self, tokenizer: Tokenizer) -> TextConfig:
        return replace(self, tokenizer=Given(tokenizer=tokenizer))

    def samples(self, seed: int, eval_tokens: int) -> Samples:
        """The documents as two token streams, in memory or from the cache, cut into samples."""
        tokenizer = self.build_tokenizer()
        if self.cache is not None:
            return self.samples_of(cached(self.with_tokenizer(tokenizer), Path(self.cache)), tokenizer, eval_tokens)
        tokens, entries, empty = encode_in_memory(divided(self.documents_after, self.val_fraction)(0), tokenizer)
        corpus = select(tokens, entries, self.selection, context=self.context, empty=empty)
        return self.packed(corpus, tokenizer, eval_tokens)

    def training_text(self, characters: int) -> Iterator[str]:
        """Pieces of the documents that are not held out, up to about so many characters, from the first on."""
        for document in divided(self.documents_after, self.val_fraction)(0):
            if is_held_out(document, self.val_fraction):
                continue
            for piece in cut(document.pieces()):
                yield piece
                characters -= len(piece)
                if characters <= 0:
                    return


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
