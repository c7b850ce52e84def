"""The written definition of each pattern, read literally: which query blocks read which key blocks, pair by pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.patterns import BlockDilated, GlobalTokens, LocalWindow, Pattern, Strided

SIZES = [(63, 16), (111, 16), (111, 64), (1000, 64), (63, 64), (1000, 16)]


@dataclass(frozen=True)
class Case:
    """One self-attention: n tokens in blocks, causal or not, documents or not."""

    n: int
    block: int
    causal: bool
    packed: bool
    heads: int = 4
    kv_heads: int = 2

    @property
    def documents(self) -> Tensor | None:
        return documents(self.n) if self.packed else None

    @property
    def blocks(self) -> int:
        return -(-self.n // self.block)

    def layout(self, pattern: Pattern, rows: range | None = None):
        return pattern.layout(
            self.n,
            block=self.block,
            heads=self.heads,
            kv_heads=self.kv_heads,
            causal=self.causal,
            documents=self.documents,
            rows=rows,
        )

    def __str__(self) -> str:
        return f"n{self.n}-b{self.block}-{'causal' if self.causal else 'both'}{'-packed' * self.packed}"


CASES = [Case(n, b, causal, packed) for n, b in SIZES for causal in (True, False) for packed in (False, True)]


def documents(n: int) -> Tensor:
    """Int32 [2, n]: borders inside blocks, on them, two in one block, a document of one token."""
    ids = torch.zeros(2, n, dtype=torch.int32)
    for sample, borders in enumerate([(5, 6, n // 2, n - 1), (n // 3, 48 if n > 48 else 1)]):
        for border in borders:
            ids[sample, border:] += 1
    return ids


def pairs_of_a_document(case: Case) -> Tensor:
    """Bool [B, n, n]: tokens i and j lie in the same document."""
    ids = torch.zeros(1, case.n) if case.documents is None else case.documents
    return ids[:, :, None] == ids[:, None, :]


def allowed_pairs(case: Case) -> Tensor:
    """Bool [B, n, n]: what causality and documents allow."""
    pairs = pairs_of_a_document(case)
    return pairs.tril() if case.causal else pairs


def hold_some(pairs: Tensor, block: int) -> Tensor:
    """[…, n, n] → […, NQ, NK]: whether query block I and key block J hold some pair of `pairs`."""
    missing = -pairs.shape[-1] % block
    padded = torch.nn.functional.pad(pairs, (0, missing, 0, missing))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).any(-1).any(-2)


def spread(tiles: Tensor, case: Case) -> Tensor:
    """[…, NQ, NK] → […, n, n]: every pair of the tiles."""
    pairs = tiles.repeat_interleave(case.block, -2).repeat_interleave(case.block, -1)
    return pairs[..., : case.n, : case.n]


def tiles_read(pattern: Pattern, case: Case) -> Tensor:
    """Bool [B, kv_heads, NQ, NK]: which blocks are read, by the definition, before causality and documents cut them."""
    match pattern:
        case LocalWindow(window):
            return _local_window(case, window)[:, None].expand(-1, case.kv_heads, -1, -1)
        case GlobalTokens(n, trailing):
            return _global_tokens(case, n, trailing)[:, None].expand(-1, case.kv_heads, -1, -1)
        case Strided(stride):
            return _by_block(case, lambda head, I, J: J % stride == stride - 1 or I == J)
        case BlockDilated(segments, rates):
            pairs = list(zip(segments, rates, strict=True))
            return _by_block(case, lambda head, I, J: I == J or any(_dilated(case, head, I, J, w, r) for w, r in pairs))
    raise AssertionError(f"no definition of {pattern}")


def _local_window(case: Case, window: int) -> Tensor:
    i, j = torch.arange(case.n)[:, None], torch.arange(case.n)
    distance = i - j
    pairs = (distance >= 0) & (distance < window) if case.causal else distance.abs() < window
    return hold_some(pairs[None], case.block)


def _global_tokens(case: Case, n: int, trailing: int) -> Tensor:
    same = pairs_of_a_document(case)
    after_start = same.tril(-1).sum(-1)  # tokens of the document before this one
    before_end = same.triu(1).sum(-1)
    is_global = (after_start < n) | (before_end < trailing)  # [B, n]
    read = hold_some(same & is_global[:, None, :], case.block)
    if not case.causal:  # the rows of such blocks read everything
        read |= hold_some(is_global[:, :, None].expand_as(same), case.block).any(-1, keepdim=True)
    return read


def _by_block(case: Case, reads) -> Tensor:
    blocks = range(case.blocks)
    table = [[[reads(head, I, J) for J in blocks] for I in blocks] for head in range(case.kv_heads)]
    return torch.tensor(table)[None]


def _dilated(case: Case, head: int, I: int, J: int, w: int, r: int) -> bool:
    first_token = {I: I * case.block, J: J * case.block}
    segment = first_token[I] // w
    if first_token[J] // w != segment:
        return False
    counted_from_start = (first_token[J] - segment * w) // case.block
    return counted_from_start % r == head % r
