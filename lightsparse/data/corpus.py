"""From tokens and the entries of their documents to two streams, train and validation, in the order of name hashes."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightsparse.data.source import DataError

log = logging.getLogger(__name__)


class Tokens(Protocol):
    """An array, or what is read like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice) -> np.ndarray: ...


class DocumentStream:
    """Documents one after the other as one array of tokens that is never made: slices are read where they lie."""

    def __init__(self, tokens: Tokens, entries: np.ndarray):
        self.tokens, self.starts, self.lengths = tokens, entries["start"], entries["tokens"]
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        parts = [self.tokens[0:0]]
        document = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            skipped = start - int(self._ends[document] - self.lengths[document])
            count = min(stop - start, int(self.lengths[document]) - skipped)
            place = int(self.starts[document]) + skipped
            parts.append(self.tokens[place : place + count])
            start, document = start + count, document + 1
        return parts[1] if len(parts) == 2 else np.concatenate(parts)


@dataclass(frozen=True)
class Corpus:
    """The two streams, each [tokens]: bos, text, bos, text, …"""

    train: DocumentStream
    val: DocumentStream
    manifest: str  # 16 hex digits over names, tokens and order of all documents


@dataclass(frozen=True, kw_only=True)
class DocumentSelection:
    """Which documents are used, and which of them are held out."""

    val_fraction: float  # chance of a document to be held out, where it does not say so itself
    min_tokens: int = 0  # of a document, bos not counted; shorter ones are left out
    max_tokens: int | None = None  # likewise, longer ones; None = no limit


def select(
    tokens: Tokens, entries: np.ndarray, selection: DocumentSelection, *, context: int, empty: int = 0
) -> Corpus:
    """Split and order the documents.

    entries  as encoding.ENTRY
    context  tokens of a sample
    empty    documents without text that are not among the entries, for the log
    A document's split and place depend on its own name only, so more documents never move the others.
    Raises DataError where a split is shorter than one sample.
    """
    lengths = entries["tokens"] - 1
    longest = np.iinfo(np.int64).max if selection.max_tokens is None else selection.max_tokens
    fits = (lengths >= selection.min_tokens) & (lengths <= longest)
    chosen = entries[fits]
    chosen = chosen[np.argsort(chosen["name"], kind="stable")]
    by_hash = bool((chosen["validation"] < 0).any())
    held_out = np.where(chosen["validation"] < 0, _shares(chosen) < selection.val_fraction, chosen["validation"] == 1)
    train, val = chosen[~held_out], chosen[held_out]
    corpus = Corpus(DocumentStream(tokens, train), DocumentStream(tokens, val), _manifest(train, val))
    filtered = f", {len(entries) - len(chosen)} of other lengths" if len(chosen) < len(entries) else ""
    log.info(
        "data: %d documents with %d tokens to train on, %d with %d held out, %d empty ones%s left out; manifest %s",
        len(train), len(corpus.train), len(val), len(corpus.val), empty, filtered, corpus.manifest,
    )  # fmt: skip
    sample = context + 1  # its last token is a label only
    if len(corpus.train) < sample:
        raise DataError(
            f"training has {len(corpus.train)} tokens in {len(train)} documents, fewer than one sample of "
            f"data.context + 1 = {sample}; lower data.context or give more text"
        )
    if len(corpus.val) < sample:
        fraction = _sufficient_fraction(chosen, sample) if by_hash else None
        remedy = (
            "lower data.context or give more documents" if fraction is None else f"use data.val_fraction={fraction}"
        )
        raise DataError(
            f"validation has {len(corpus.val)} tokens in {len(val)} documents, fewer than one sample of "
            f"data.context + 1 = {sample}; {remedy}"
        )
    return corpus


def _shares(entries: np.ndarray) -> np.ndarray:
    """fp64 [documents] in [0, 1), documents.hash_share of their names."""
    return (entries["name"] >> np.uint64(16)).astype(np.float64) / (1 << 48)


def _manifest(train: np.ndarray, val: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for entries in (train, val):
        digest.update(f"{len(entries)} documents\0".encode())
        for field in ("name", "tokens", "digest"):
            digest.update(np.ascontiguousarray(entries[field]).data)
    return digest.hexdigest()


def _sufficient_fraction(in_hash_order: np.ndarray, sample: int) -> float | None:
    """The smallest val_fraction of two digits that holds out one sample, if that leaves one to train on."""
    lengths, shares = in_hash_order["tokens"], _shares(in_hash_order)
    enough = int(np.searchsorted(np.cumsum(lengths), sample))  # documents before the one that completes a sample
    if enough == len(lengths):
        return None
    fraction = (int(shares[enough] * 100) + 1) / 100
    left = int(lengths[shares >= fraction].sum())
    return fraction if fraction < 1.0 and left >= sample else None
