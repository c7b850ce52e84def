"""Tiles of FlexAttention's Triton kernels on CUDA, from a table in place of a search when a shape is first met.

A search takes minutes, depends on what else the GPU does, and two runs may then round differently. The entries are
those of PyTorch 2.13 where it takes one without a search (torch/_inductor/template_heuristics/triton.py), smaller where
registers would spill or shared memory not suffice, and none of them is timed. What the table says is cut down to powers
of two that divide the layout's blocks, since the kernels take no others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Tiles(NamedTuple):
    """Tokens, warps and pipeline stages of a kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


class _Kernels(NamedTuple):
    forward: Tiles
    backward: Tiles  # queries × keys of the pass over key blocks; that over query blocks has them the other way round


_SMALLEST = Tiles(16, 16, 4, 1)
# By head dim up to this. A backward tile holds four operands and two sums, so it is smaller than a forward one.
_SM80 = {
    64: _Kernels(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2)),
    128: _Kernels(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)),
    256: _Kernels(Tiles(32, 64, 4, 2), Tiles(32, 32, 4, 1)),
}
_SMALL_SHARED_MEMORY = {  # 8.6, 8.9, 12.x: 100 KB
    64: _Kernels(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 1)),
    128: _Kernels(Tiles(64, 64, 4, 2), Tiles(32, 32, 4, 2)),
    256: _Kernels(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1)),
}
_SM90 = {
    64: _Kernels(Tiles(128, 64, 4, 3), Tiles(64, 128, 8, 3)),  # 128 × 128 spills
    128: _Kernels(Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)),
    256: _Kernels(Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 2)),
}
_SM100 = {
    64: _Kernels(Tiles(128, 64, 4, 3), Tiles(64, 128, 4, 3)),
    128: _Kernels(Tiles(128, 64, 8, 3), Tiles(64, 128, 4, 2)),
    256: _Kernels(Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 1)),
}
_FP32 = {  # every capability: twice the bytes, and the products are not the bottleneck
    64: _Kernels(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 1)),
    128: _Kernels(Tiles(32, 32, 4, 2), Tiles(16, 16, 4, 1)),
    256: _Kernels(Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1)),
}
_BY_CAPABILITY = {(8, 0): _SM80, (8, 7): _SM80, (9, 0): _SM90, (10, 0): _SM100, (10, 3): _SM100}


def tile_options(
    q_block: int, kv_block: int, dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> dict[str, Any]:
    """FlexAttention's kernel_options for tiles that divide a layout's blocks.

    q_block, kv_block  tokens; multiples of 16
    dim                of a head
    capability         of the GPU: major, minor; one that is not in the table gets the tiles of the smallest chips
    """
    table = _FP32 if dtype == torch.float32 else _BY_CAPABILITY.get(capability, _SMALL_SHARED_MEMORY)
    of_dim = next((kernels for most, kernels in table.items() if dim <= most), _Kernels(_SMALLEST, _SMALLEST))
    forward, backward = (_dividing(tiles, q_block, kv_block) for tiles in of_dim)
    # The kernel walks one side of a tile in steps of the other: each pass needs its own side to be the larger one.
    few, many = min(backward.queries, backward.keys), min(max(backward.queries, backward.keys), _power(q_block))
    return {
        "fwd_BLOCK_M": forward.queries,
        "fwd_BLOCK_N": forward.keys,
        "fwd_num_warps": forward.warps,
        "fwd_num_stages": forward.stages,
        "bwd_BLOCK_M1": few,
        "bwd_BLOCK_N1": backward.keys,
        "bwd_BLOCK_M2": max(many, few),
        "bwd_BLOCK_N2": few,
        "bwd_num_warps": backward.warps,
        "bwd_num_stages": backward.stages,
    }


def _dividing(tiles: Tiles, q_block: int, kv_block: int) -> Tiles:
    """Cut down to the blocks; a smaller tile has no work for eight warps."""
    cut = tiles._replace(queries=min(tiles.queries, _power(q_block)), keys=min(tiles.keys, _power(kv_block)))
    return cut if cut == tiles else cut._replace(warps=4)


def _power(block: int) -> int:
    """The largest power of two that divides a block."""
    return block & -block
