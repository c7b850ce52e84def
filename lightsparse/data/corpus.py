"""From documents to two token streams, train and validation, each in the order of its documents' hashes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lightsparse.data.documents import Document, hash_share
from lightsparse.data.source import DataError
from lightsparse.data.tokens import ByteTokenizer, token_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """The two streams, each [tokens]: bos, text, bos, text, …"""

    train: np.ndarray
    val: np.ndarray
    manifest: str  # 16 hex digits over names, tokens and order of all documents


@dataclass(frozen=True)
class _Encoded:
    """A document on its way into a stream; sorts by hash, then name."""

    share: float
    name: str
    tokens: np.ndarray


def build_corpus(
    documents: Iterable[Document], tokenizer: ByteTokenizer, *, val_fraction: float, context: int
) -> Corpus:
    """Read, tokenize and split the documents.

    val_fraction  chance of a document to be held out, where it does not say so itself
    context       tokens of a sample
    A document's split depends on its own name only, so more documents never move the others. Empty documents are left
    out and counted in the log. Needs about twice the memory of the tokens.
    Raises DataError where a split is shorter than one sample.
    """
    train: list[_Encoded] = []
    val: list[_Encoded] = []
    empty, by_hash = 0, True
    for document in documents:
        if not document.text:
            empty += 1
            continue
        share, by_hash = hash_share(document.name), document.validation is None
        held_out = share < val_fraction if by_hash else document.validation
        (val if held_out else train).append(_Encoded(share, document.name, tokenizer.encode(document.text)))
    for encoded in (train, val):
        encoded.sort(key=lambda document: (document.share, document.name))
    corpus = Corpus(_stream(train, tokenizer), _stream(val, tokenizer), _manifest(train, val))
    log.info(
        "data: %d documents with %d tokens to train on, %d with %d held out, %d empty ones left out; manifest %s",
        len(train), len(corpus.train), len(val), len(corpus.val), empty, corpus.manifest,
    )  # fmt: skip
    sample = context + 1  # its last token is a label only
    if len(corpus.train) < sample:
        raise DataError(
            f"training has {len(corpus.train)} tokens in {len(train)} documents, fewer than one sample of "
            f"data.context + 1 = {sample}; lower data.context or give more text"
        )
    if len(corpus.val) < sample:
        fraction = _sufficient_fraction(val + train, sample) if by_hash else None
        remedy = (
            "lower data.context or give more documents" if fraction is None else f"use data.val_fraction={fraction}"
        )
        raise DataError(
            f"validation has {len(corpus.val)} tokens in {len(val)} documents, fewer than one sample of "
            f"data.context + 1 = {sample}; {remedy}"
        )
    return corpus


def _stream(documents: list[_Encoded], tokenizer: ByteTokenizer) -> np.ndarray:
    bos = np.array([tokenizer.bos], dtype=token_dtype(tokenizer.vocab_size))
    return np.concatenate([bos[:0], *(piece for document in documents for piece in (bos, document.tokens))])


def _manifest(train: list[_Encoded], val: list[_Encoded]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for documents in (train, val):
        digest.update(f"{len(documents)} documents\0".encode())
        for document in documents:
            digest.update(f"{document.name}\0{len(document.tokens)}\0".encode())
            digest.update(document.tokens.data)
    return digest.hexdigest()


def _sufficient_fraction(in_hash_order: list[_Encoded], sample: int) -> float | None:
    """The smallest val_fraction of two digits that holds out one sample, if that leaves one to train on."""
    lengths = [1 + len(document.tokens) for document in in_hash_order]
    enough = int(np.searchsorted(np.cumsum(lengths), sample))  # documents before the one that completes a sample
    if enough == len(lengths):
        return None
    fraction = (int(in_hash_order[enough].share * 100) + 1) / 100
    left = sum(n for n, document in zip(lengths, in_hash_order, strict=True) if document.share >= fraction)
    return fraction if fraction < 1.0 and left >= sample else None
