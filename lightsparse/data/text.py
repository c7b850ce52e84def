"""Text as data: documents, tokenized into two streams, cut into samples of one context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightsparse.data.corpus import build_corpus
from lightsparse.data.documents import Document
from lightsparse.data.packing import EvaluationSamples, PackedSamples
from lightsparse.data.source import DataConfig, Samples
from lightsparse.data.tokens import ByteTokenizer


@dataclass(frozen=True, kw_only=True)
class TextConfig(DataConfig):
    """What every source of text has. A source adds its own and yields `documents()`."""

    pack: Literal["isolate", "concat"] = "isolate"  # may a token see the document packed before its own: no | yes
    val_fraction: float = 0.05  # chance of a document to be held out; unused where the source names its own validation

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack not in ("isolate", "concat"):
            raise ValueError(f"data.pack is {self.pack!r}; it must be isolate (documents apart) or concat (one stream)")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction is {self.val_fraction}; it is a share and must lie in (0, 1)")

    @property
    def isolated(self) -> bool:
        return self.pack == "isolate"

    @property
    def tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer()

    def documents(self) -> Iterator[Document]:
        """Every document of the source, in any order; DataError where the source cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} has no documents")

    def samples(self, seed: int, eval_tokens: int) -> Samples:
        """The documents as two token streams, cut into samples."""
        corpus = build_corpus(self.documents(), self.tokenizer, val_fraction=self.val_fraction, context=self.context)
        packing = (self.context, self.tokenizer.bos, self.isolated)
        return Samples(
            PackedSamples(corpus.train, *packing),
            EvaluationSamples(corpus.val, *packing, limit=eval_tokens),
            self.tokenizer,
            _digest(corpus.manifest, self.tokenizer.name, self.context, self.pack),
            len(corpus.train),
        )


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
