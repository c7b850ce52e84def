"""The `flex` backend: PyTorch's FlexAttention over a BlockLayout; the default for layouts in tiles on CUDA.

FlexAttention (Dong et al. 2024, arXiv 2412.05496) compiles a kernel that walks the tiles a BlockMask lists and applies
a token-level rule, here the layout's ElementMask, in those that are not read in full. Only the compiled kernel skips
tiles: the eager one reads the rule alone, so it must never run in its place.

State of the process: `_block_masks`, FlexAttention's form of each layout, as long as it lives; `_compiled`'s cache, a
compiled function per kind of device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lightsparse.patterns.layout import BlockLayout

LIST_BYTES_LIMIT = 1 << 30  # of the four lists of a BlockMask, which are as wide as there are blocks: 1 GiB
CUDA_BLOCK = 32  # tokens: the smallest tile for which PyTorch has a backward in every dtype; blocks are multiples of it
_CUDA_HEAD_DIM = 16  # the smallest product of Triton
_COMPILATIONS = 64  # kernels per process, an error beyond: one or two (CPU: one per length) for each set of shapes

_block_masks: WeakKeyDictionary[BlockLayout, BlockMask] = WeakKeyDictionary()


def refusal(q: Tensor, layout: BlockLayout, *, gradients: bool, lse: bool) -> str | None:
    """Why FlexAttention cannot serve q [B, H, Nq, D] under this layout, or None."""
    on = q.device.type
    if on not in ("cuda", "cpu"):
        return f"runs on CUDA and CPU, not on {on}"
    if on == "cpu" and gradients:
        return "has no backward on CPU"
    if on == "cpu" and lse:
        return "returns no lse on CPU"
    if on == "cpu" and not torch.cpu.get_capabilities().get("avx2"):
        return "compiles for CPUs with AVX2 only"
    if layout.mask.dense is not None:
        return "takes no mask.dense"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes in fp32, bf16 and fp16, not in {str(q.dtype).removeprefix('torch.')}"
    if on == "cuda" and q.shape[-1] < _CUDA_HEAD_DIM:
        return f"needs a head dim of at least {_CUDA_HEAD_DIM} on CUDA, not {q.shape[-1]}"
    if on == "cuda" and (layout.q_block % CUDA_BLOCK or layout.kv_block % CUDA_BLOCK):
        return f"needs blocks in multiples of {CUDA_BLOCK} on CUDA, not {layout.q_block} × {layout.kv_block}"
    size = list_bytes(layout, q.shape[1])
    if size > LIST_BYTES_LIMIT:
        return (
            f"lists tiles at full width, {size / 2**30:.1f} GiB for this layout where "
            f"{LIST_BYTES_LIMIT / 2**30:g} GiB are allowed (larger blocks or fewer distinct heads need less)"
        )
    return None


def list_bytes(layout: BlockLayout, heads: int) -> int:
    """Bytes of the layout's BlockMask for `heads` query heads: four int32 lists with an entry per pair of blocks."""
    tables = _batch(layout) * _heads(layout, heads)
    return 4 * 4 * tables * layout.num_q_blocks * layout.num_kv_blocks


def block_mask(layout: BlockLayout, heads: int) -> BlockMask:
    """FlexAttention's form of a layout for `heads` query heads; built once, kept as long as the layout lives.

    Its batch and heads stay 1 where all samples or heads share a table; a table per key/value head is repeated for the
    query heads that share it, since the CUDA kernel finds a head's table by h modulo their number.
    """
    if layout not in _block_masks:
        with torch.inference_mode(False):  # built while evaluating, it serves training too
            _block_masks[layout] = layout.to_flex(_batch(layout), _heads(layout, heads))
    return _block_masks[layout]


def flex_alone(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: None, dropout: None) -> Tensor:
    """out [B, H, Nq, D]; differentiable on CUDA."""
    return _run(q, k, v, layout, scale, with_lse=False)[0]


def flex_with_lse(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: None, dropout: None
) -> tuple[Tensor, Tensor]:
    """out and lse [B, H, Nq] in fp32; both differentiable on CUDA."""
    out, lse = _run(q, k, v, layout, scale, with_lse=True)
    # A row with nothing to read passes no gradient on, not even the NaN of a merge of two such rows.
    return out, lse.masked_fill(lse == float("-inf"), float("-inf"))


@torch.compiler.disable  # a model compiled around it would compile it anew, without the search for a tile that fits
def _run(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, with_lse: bool) -> tuple[Tensor, ...]:
    """out, and the lse if asked for."""
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # on CPU it refuses what requires a gradient, wanted or not
    options = tile_options(layout) if q.device.type == "cuda" else {}
    return _compiled(q.device.type)(q, k, v, block_mask(layout, q.shape[1]), scale, with_lse, options)


def tile_options(layout: BlockLayout) -> dict[str, Any]:
    """Kernel options for CUDA: forward tiles that divide the layout's blocks, where PyTorch's own do not.

    PyTorch searches among tiles of 64 and 128 tokens forward, and from 32 on backward.
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}  # not its decoding kernel, which has tiles of its own
    if layout.q_block % 64 or layout.kv_block % 64:
        options["fwd_BLOCK_M"] = min(_power_of_two_in(layout.q_block), 64)
        options["fwd_BLOCK_N"] = min(_power_of_two_in(layout.kv_block), 64)
    return options


@cache
def _compiled(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    # On CUDA the one tile PyTorch takes without a search is up to 128 wide and does not divide smaller blocks. On CPU
    # PyTorch 2.13 writes C++ that does not compile for some lengths that vary, so every shape has its own kernel there.
    mode, dynamic = ("max-autotune-no-cudagraphs", None) if device_type == "cuda" else (None, False)
    return torch.compile(  # type: ignore[call-overload]  # its overloads leave recompile_limit out
        _attend, fullgraph=True, mode=mode, dynamic=dynamic, recompile_limit=_COMPILATIONS
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, tiles: BlockMask, scale: float, with_lse: bool, options: Any
) -> tuple[Tensor, ...]:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.compile is switched off, and FlexAttention without it ignores the layout's blocks; "
            "unset TORCH_COMPILE_DISABLE or use backend=blocked"
        )
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1], "kernel_options": options}
    if not with_lse:
        return (flex_attention(q, k, v, block_mask=tiles, **options),)
    out, aux = flex_attention(q, k, v, block_mask=tiles, return_aux=AuxRequest(lse=True), **options)
    return out, aux.lse


def _batch(layout: BlockLayout) -> int:
    mask = layout.mask
    return max(
        len(x) for x in (layout.kv_indices, mask.q_pos, mask.visible_from, mask.q_doc, mask.kv_doc) if x is not None
    )


def _heads(layout: BlockLayout, heads: int) -> int:
    return 1 if layout.kv_indices.shape[1] == 1 else heads


def _power_of_two_in(block: int) -> int:
    """The largest power of two that divides a block."""
    return block & -block
