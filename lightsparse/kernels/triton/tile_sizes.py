"""How many rows and keys a program takes at once, with how many warps and stages: chosen from a table, never searched.

Each entry compiles for its GPU without spilling a register and within its shared memory, which
tests/kernels/triton/test_triton_compiles.py shows by compiling it; none has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TileSize(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int


class TileSizes(NamedTuple):
    rows_forward: TileSize
    rows_backward: TileSize
    columns_forward: TileSize
    columns_backward: TileSize  # dk and dv, by a key block of tiles
    columns_backward_dq: TileSize  # and dq, by a key block of rows of single queries


def _sizes(*sizes: tuple[int, int, int, int]) -> TileSizes:
    return TileSizes(*(TileSize(*size) for size in sizes))


# By compute capability and head dim, up to which an entry holds: the first that fits.
_HALF: dict[int, dict[int, TileSizes]] = {
    8: {
        64: _sizes((128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
        128: _sizes((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        256: _sizes((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    },
    9: {
        64: _sizes((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2)),
        128: _sizes((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        256: _sizes((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    10: {
        64: _sizes((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2)),
        128: _sizes((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        256: _sizes((64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
}
_FP32 = {
    64: _sizes((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 1)),
    128: _sizes(*[(16, 32, 4, 1)] * 5),
    256: _sizes(*[(16, 16, 4, 1)] * 4, (16, 16, 8, 1)),
}


def tile_sizes(capability: int, dtype: torch.dtype, head_dim: int, kv_block: int, rows: int, extras: bool) -> TileSizes:
    """Of a GPU by its major compute capability (newer ones as 10.x); keys divide the block, rows are no more than fill.

    extras  a block bias or dropout: half the rows by column, as both take registers
    """
    of_capability = _FP32 if dtype.itemsize > 2 else _HALF[min(max(capability, 8), 10)]
    sizes = next(entry for most, entry in of_capability.items() if head_dim <= most)
    keys = kv_block & -kv_block  # the largest power of two in it
    fill = max(16, 1 << (rows - 1).bit_length())
    by_row = [size._replace(rows=min(size.rows, fill), keys=min(size.keys, keys)) for size in sizes[:2]]
    by_column = [size._replace(rows=max(size.rows >> extras, 16), keys=min(size.keys, keys)) for size in sizes[2:]]
    return TileSizes(*by_row, *by_column)
