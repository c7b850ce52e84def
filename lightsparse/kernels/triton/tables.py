"""A layout's table as the kernels here read it: by row, and turned around by column.

Names of dimensions: B samples, H query heads, Hkv key/value heads, U heads with lists of their own (H where the table
has one per query head, else Hkv), G = H / U query heads that share a list, RATIO = U / Hkv, NQ rows of the table, Q
queries of a row, M = Q · G of them times heads, K entries of a row, S keys of a block, J key blocks, D head dim,
T tables (samples × list heads that have one of their own), E entries of a table with those of its dense rows.

Nothing here reads a value back: sizes follow from shapes, so that the host never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightsparse.patterns.layout import BlockLayout

_PARTIAL, _LISTED, _BITS = 1, 2, 2  # scores.py
_CHUNK = 1024  # entries that one program counts


@dataclass(frozen=True)
class Rows:
    """Of each row of each table the key blocks that it reads.

    entries    int32 [T, E]: block · 4 + bits (scores.py), −1 behind the end of a row
    row_start  int32 [NQ]: where in E a row begins
    row_count  int32 [T, NQ]: how many it has
    row_of     int32 [E]: the row of each entry
    place_of   int32 [E]: which of its row's entries it is
    shape      samples and list heads that have a table of their own: T is their product
    """

    shape: tuple[int, int]
    entries: Tensor
    row_start: Tensor
    row_count: Tensor
    row_of: Tensor
    place_of: Tensor


@dataclass(frozen=True)
class Columns:
    """Of each key block of some tables the rows that read it, cut into segments of bounded length.

    row, entry     int32 [T · E + 1]: rows, and place in the row · 4 + bits; by block
    start          int32 [T · J + 1]: where in them a block's begin
    block          int32 [segments]: of each segment; T · J where there is none
    first_segment  int32 [T · J + 1]: of each block; each has `longest` of the block's entries, the last what is left
    """

    row: Tensor
    entry: Tensor
    start: Tensor
    block: Tensor
    first_segment: Tensor
    longest: int


def rows_of(layout: BlockLayout, tables: tuple[int, int] | None = None) -> Rows:
    """The rows of a layout's tables; of all [B, U] samples and list heads where `tables` says how many there are.

    A dense row's entries are all key blocks. Rows of single queries have the bit PARTIAL everywhere: to find the tiles
    that need no mask would take longer than the mask.
    """
    table, device = layout.kv_indices, layout.kv_indices.device
    partial = 1 if layout.q_block == 1 else (~layout.full_tiles).to(torch.int32)
    coded = table * (1 << _BITS) + (_LISTED + _PARTIAL * partial)  # of −1 it is −1: padding is partial
    table = table.expand(len(coded), -1, -1, -1)
    if tables is not None:
        table, coded = (x.expand(tables[0], tables[1], -1, -1) for x in (table, coded))
    batch, heads, rows, width = table.shape
    counts = (table >= 0).sum(-1, dtype=torch.int32).flatten(0, 1)
    entries = coded.reshape(batch * heads, rows * width)
    number = torch.arange(rows, dtype=torch.int32, device=device)
    start, row_of = number * width, number.repeat_interleave(width)
    place_of = torch.arange(width, dtype=torch.int32, device=device).repeat(rows)
    dense = layout.dense_rows.long()
    if len(dense):
        blocks = torch.arange(layout.num_kv_blocks, dtype=torch.int32, device=device)
        every = (blocks * (1 << _BITS) + _PARTIAL).repeat(len(dense))
        entries = torch.cat([entries, every.expand(batch * heads, -1)], 1)
        start = start.index_copy(
            0, dense, rows * width + torch.arange(len(dense), dtype=torch.int32, device=device) * len(blocks)
        )
        counts = counts.index_fill(1, dense, len(blocks))
        row_of = torch.cat([row_of, layout.dense_rows.to(torch.int32).repeat_interleave(len(blocks))])
        place_of = torch.cat([place_of, blocks.repeat(len(dense))])
    return Rows((batch, heads), entries.contiguous(), start, counts.contiguous(), row_of, place_of)


def columns_of(rows: Rows, first: int, stop: int, blocks: int, longest: int) -> Columns:
    """The columns of tables first … stop − 1, of `blocks` key blocks each, in segments of up to `longest` entries.

    A counting sort: the same order as a stable one, without comparing, and no value is read back.
    """
    entries = rows.entries[first:stop]
    (tables, width), device = entries.shape, entries.device
    chunk = min(max(triton.next_power_of_2(width), 32), _CHUNK)
    chunks = max(triton.cdiv(width, chunk), 1)
    counts = torch.zeros(tables, chunks, blocks, dtype=torch.int32, device=device)
    rank = torch.empty(tables, width, dtype=torch.int32, device=device)
    sizes = (width, chunks, blocks)
    if width:
        _rank_in_chunk[(tables * chunks,)](
            entries, rank, counts, *sizes, BITS=_BITS, CHUNK=chunk, BLOCK=32, num_warps=8
        )
    until = counts.cumsum(1, dtype=torch.int32)
    total = until[:, -1].flatten()  # [T · J]
    start = F.pad(total.cumsum(0, dtype=torch.int32), (1, 0))
    row, entry = (torch.empty(tables * width + 1, dtype=torch.int32, device=device) for _ in range(2))
    if width:
        _place[(tables * chunks,)](
            entries, rank, counts, until, start, rows.row_of, rows.place_of, row, entry, *sizes, BITS=_BITS, CHUNK=chunk
        )
    first_segment = F.pad(((total + (longest - 1)) // longest).cumsum(0, dtype=torch.int32), (1, 0))
    segments = torch.arange(tables * blocks + tables * width // longest, dtype=torch.int32, device=device)
    block = torch.searchsorted(first_segment[1:], segments, right=True, out_int32=True)
    return Columns(row, entry, start, block, first_segment, longest)


@triton.jit
def _rank_in_chunk(
    entries, rank, counts, width, chunks, blocks, BITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each entry how many before it in its chunk have its block, and of each chunk how many have each block."""
    table, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    at_C = chunk * CHUNK + tl.arange(0, CHUNK)
    block_C = tl.load(entries + table * width + at_C, at_C < width, -1) >> BITS
    for first in range(0, CHUNK, BLOCK):
        at_I = chunk * CHUNK + first + tl.arange(0, BLOCK)
        block_I = tl.load(entries + table * width + at_I, at_I < width, -1) >> BITS
        same_IC = block_I[:, None] == block_C[None, :]
        before_I = tl.sum((same_IC & (at_C[None, :] < at_I[:, None])).to(tl.int32), 1)
        all_I = tl.sum(same_IC.to(tl.int32), 1)
        tl.store(rank + table * width + at_I, before_I, at_I < width)
        is_last_I = (before_I == all_I - 1) & (block_I >= 0)
        tl.store(counts + (table * chunks + chunk) * blocks + block_I, all_I, is_last_I)


@triton.jit
def _place(
    entries, rank, counts, until, start, row_of, place_of, row, entry, width, chunks, blocks,
    BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each entry to its place by block: behind those of earlier blocks, of earlier chunks, and earlier in its own."""
    table, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    at_C = chunk * CHUNK + tl.arange(0, CHUNK)
    code_C = tl.load(entries + table * width + at_C, at_C < width, -1)
    is_entry_C, block_C = code_C >= 0, code_C >> BITS
    of_chunk_C = (table * chunks + chunk) * blocks + block_C
    to_C = tl.load(start + table * blocks + block_C, is_entry_C, 0)
    to_C += tl.load(until + of_chunk_C, is_entry_C, 0) - tl.load(counts + of_chunk_C, is_entry_C, 0)
    to_C += tl.load(rank + table * width + at_C, is_entry_C, 0)
    tl.store(row + to_C, tl.load(row_of + at_C, is_entry_C, 0), is_entry_C)
    code_C = (tl.load(place_of + at_C, is_entry_C, 0) << BITS) + (code_C & ((1 << BITS) - 1))
    tl.store(entry + to_C, code_C, is_entry_C)
