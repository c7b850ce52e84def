"""Random blocks: every row reads a few blocks drawn once and for all (BigBird, Zaheer et al. 2020, arXiv 2007.14062).

The draws are the first n images of a permutation that is a pure function of (seed, head, row): swap-or-not (Hoang,
Morris, Rogaway 2012, doi 10.1007/978-3-642-32009-5_1), which permutes a range of any length without a table of it. So
draws are without replacement by construction, nothing is sorted or rejected, and a row never asks about another row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.patterns.grid import BlockGrid
from lightsparse.patterns.pattern import Pattern
from lightsparse.utils.hashing import chain, mixed

_ROUNDS = 16  # each moves an image to a fresh place with probability ½: what is left of the start is below 2⁻¹⁶
_AT_ONCE = 1 << 15  # draws; their temporaries stay in the processor's cache
_POSITIVE = (1 << 63) - 1


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """Block I reads n blocks, drawn without replacement from those it may read: all, or up to its own if causal.

    With packed documents these are the blocks that share a document with the row, and rows and blocks are counted from
    the first of them, so that a packed document draws what it would draw alone. A row with no more than n such blocks
    reads them all. The same seed gives the same pattern on every device and for any part of the rows; a causal row
    draws the same in a longer sequence; with a larger n it keeps what it has drawn.
    """

    n: int  # blocks per row
    seed: int = 0
    per_head: bool = False  # every key/value head draws its own, as in the paper's code; False: all share one draw

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"RandomBlocks.n is {self.n}; it counts blocks and must be at least 1")

    def rows(self, grid: BlockGrid) -> Tensor:
        first, last = _allowed(grid)
        count = (last - first + 1)[:, None, :, None]  # [B|1, 1, NQ, 1]
        row = (grid.row_ids - first)[:, None, :, None]
        draws = torch.arange(min(self.n, grid.num_kv), device=grid.device)
        drawn = draws
        if self.n < grid.num_kv:  # otherwise every row reads all it may, in whatever order
            heads = torch.arange(grid.kv_heads if self.per_head else 1, device=grid.device)[None, :, None, None]
            key = chain(mixed(self.seed), heads, row)
            rows = max(_AT_ONCE // (key.shape[0] * key.shape[1] * self.n), 1)
            parts = zip(count.split(rows, 2), key.split(rows, 2), strict=True)
            drawn = torch.cat([permuted(draws, *part) for part in parts], dim=2)
        return grid.visible(torch.where(draws < count, first[:, None, :, None] + drawn, -1))


def permuted(x: Tensor, count: Tensor, key: Tensor) -> Tensor:
    """Image of x under the permutation of 0 … count − 1 that `key` names; all int64, broadcast together.

    Entries with x ≥ count mean nothing. Time and memory O(entries).
    """
    for number in range(_ROUNDS):
        round_key = chain(key, torch.tensor(number, device=key.device))
        partner = (round_key & _POSITIVE) % count - x
        partner = torch.where(partner < 0, partner + count, partner)
        # A pair {x, partner} is swapped or not, as a bit of their common name says: hence a bijection.
        x = torch.where(chain(round_key, torch.maximum(x, partner)) < 0, partner, x)
    return x


def _allowed(grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """First and last block each row may read: two int64 [B|1, NQ]. Documents are contiguous, and so are these."""
    document_start, document_end = grid.document_spans()
    row_start = grid.row_ids.long() * grid.block
    row_end = (row_start + grid.block - 1).clamp(max=grid.seq_len - 1)
    first = document_start[:, row_start].long() // grid.block
    last = grid.row_ids.long().expand_as(first) if grid.causal else document_end[:, row_end].long() // grid.block
    return first, last
