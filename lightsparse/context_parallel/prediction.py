"""How many bytes of keys and values an exchange sends, from the layout alone: nothing is exchanged to know it.

Counted are the keys and values of one attention layer and their gradients, not the few bytes in which ranks say what
they want.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.context_parallel.split import Split
from lightsparse.patterns import BlockLayout

_GRADIENT_BYTES = 4  # at least: the ring's gradients travel in fp32, because many ranks add to them on the way


@dataclass(frozen=True)
class KeyBytes:
    """Sizes of what is sent for one key of one sample: `heads` key/value heads, `dim` numbers each, key and value."""

    heads: int
    dim: int
    itemsize: int  # bytes per number

    @property
    def of_head(self) -> int:
        return 2 * self.dim * self.itemsize

    @property
    def of_key(self) -> int:
        return self.heads * self.of_head


def sparse_sent(layout: BlockLayout, split: Split, size: KeyBytes) -> tuple[list[int], list[int]]:
    """Bytes each rank sends of keys, and of their gradients; `layout` is that of the whole sequence, one sample."""
    keys, gradients = [0] * split.world, [0] * split.world
    table = _by_kv_head(layout, size.heads)
    owner, length = split.rank_of[:: layout.kv_block], _lengths(layout)
    of_row = split.rank_of[:: layout.q_block]
    dense = torch.zeros(layout.num_q_blocks, dtype=torch.bool)
    dense[layout.dense_rows.long()] = True
    for rank in range(split.world):
        mine = of_row == rank
        for head_table in table:
            named = head_table[mine].flatten().unique()
            named = named[named >= 0].long()
            if bool(dense[mine].any()):
                named = torch.arange(layout.num_kv_blocks)
            named = named[owner[named] != rank]
            heads = 1 if len(table) > 1 else size.heads
            sent = torch.zeros(split.world, dtype=torch.int64)
            sent.index_add_(0, owner[named], length[named] * heads * size.of_head)
            for of_rank, count in enumerate(sent.tolist()):
                keys[of_rank] += count
            gradients[rank] += int(sent.sum())
    return keys, gradients


def gather_sent(split: Split, size: KeyBytes) -> tuple[list[int], list[int]]:
    """The same when everything goes to everybody."""
    keys = [(split.world - 1) * count * size.of_key for count in split.counts]
    return keys, [(split.length - count) * size.of_key for count in split.counts]


def ring_sent(split: Split, size: KeyBytes, hops: int | None = None) -> tuple[list[int], list[int]]:
    """The same for a ring of so many hops, the first, a rank's own keys, included; None: as many as ranks.

    In the backward the keys travel once more, and their gradients with them and home.
    """
    world, counts = split.world, split.counts
    hops = world if hops is None else hops
    keys, gradients = [], []
    for rank in range(world):
        passed = sum(counts[(rank - hop) % world] for hop in range(hops - 1))
        home = counts[(rank - hops + 1) % world] if hops > 1 else 0
        keys.append(2 * passed * size.of_key)
        gradients.append((passed + home) * size.heads * 2 * size.dim * max(size.itemsize, _GRADIENT_BYTES))
    return keys, gradients


def _by_kv_head(layout: BlockLayout, kv_heads: int) -> list[Tensor]:
    """What each key/value head reads, [NQ, K]; one entry where all read the same."""
    if layout.kv_indices.shape[0] != 1:
        raise ValueError("the layout differs between samples; a prediction is for layouts without documents")
    table = layout.kv_indices[0]
    if len(table) > kv_heads:  # a table per query head: those of a group fetch for all of it
        table = table.unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(2)
    return list(table)


def _lengths(layout: BlockLayout) -> Tensor:
    """Keys in each block: int64."""
    starts = torch.arange(layout.num_kv_blocks) * layout.kv_block
    return (layout.num_keys - starts).clamp(max=layout.kv_block)
