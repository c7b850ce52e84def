"""The `flex` backend: PyTorch's FlexAttention over a BlockLayout; the default for layouts in tiles on CUDA.

FlexAttention (Dong et al. 2024, arXiv 2412.05496) compiles a kernel that walks the tiles a BlockMask lists and applies
a token-level rule, here the layout's ElementMask, in those that are not read in full. Only the compiled kernel skips
tiles: the eager one reads the rule alone, so it must never run in its place.

On CUDA the kernel is Triton's, in tiles from a table (flex_tiles.py), or by `use_kernel("flash")` FlashAttention 4's.

State of the process: `_block_masks`, FlexAttention's form of each layout, as long as it lives; `_compiled`'s cache, a
compiled function per kind of device; `_kernel`, set by `use_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lightsparse.kernels import flash
from lightsparse.kernels.flex_tiles import tile_options
from lightsparse.patterns.layout import BlockLayout

LIST_BYTES_LIMIT = 1 << 30  # of the four lists of a BlockMask, which are as wide as there are blocks: 1 GiB
CUDA_BLOCK = 32  # tokens: the smallest tile for which PyTorch has a backward in every dtype; blocks are multiples of it
_CUDA_HEAD_DIM = 16  # the smallest product of Triton
_COMPILATIONS = 64  # kernels per process, an error beyond: one or two (CPU: one per length) for each set of shapes
# FlexAttention leaves out a backward kernel whose default tile does not divide the layout's blocks, before it looks at
# the tiles it was given; only among those of a search is there always one that does. So the search's list is asked for,
# in which our options make all entries one, and `deterministic` takes the first of them without timing any.
_WITHOUT_SEARCH = {"max_autotune": True, "deterministic": True}
# What flash-attn-4 (4.0.0b36, flash_attn/cute/interface.py) asks of block-sparse calls that are trained.
_FLASH_HEAD_DIMS = range(8, 129, 8)
_FLASH_QUERIES, _FLASH_KEYS = {9: 128, 10: 256}, 128  # a row's queries a multiple, by major capability; its keys alike
_kernel = "triton"

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
    if on == "cuda" and _kernel == "flash":
        _check_flash(q, layout, gradients=gradients, lse=lse)
    return None


def use_kernel(choice: str) -> None:
    """From now on FlexAttention on CUDA runs this kernel, in all threads of the process.

    choice  auto = triton; triton; flash = FlashAttention 4 (package flash-attn-4), which PyTorch calls experimental
    Raises ValueError for another word, and for flash where it cannot run.
    """
    global _kernel
    if choice not in ("auto", "triton", "flash"):
        raise ValueError(f"kernels.flex_backend is {choice!r}; choose auto, triton or flash")
    if choice == "flash" and (reason := flash.KERNELS["fa4"].obstacle()) is not None:
        raise ValueError(f"kernels.flex_backend is flash; {reason}; use kernels.flex_backend=triton")
    _kernel = "flash" if choice == "flash" else "triton"


def _check_flash(q: Tensor, layout: BlockLayout, *, gradients: bool, lse: bool) -> None:
    """Raise ValueError for a call that Triton's kernel takes and FlashAttention's, which was asked for, does not."""
    major = torch.cuda.get_device_capability(q.device)[0]
    queries = _FLASH_QUERIES.get(major, 256)
    reason = None
    if q.dtype not in (torch.bfloat16, torch.float16):
        reason = f"it computes in bf16 and fp16, not in {str(q.dtype).removeprefix('torch.')}"
    elif q.shape[-1] not in _FLASH_HEAD_DIMS:
        reason = f"it takes head dims in multiples of 8 up to {_FLASH_HEAD_DIMS[-1]}, not {q.shape[-1]}"
    elif layout.q_block % queries or layout.kv_block != _FLASH_KEYS:
        reason = (
            f"on this GPU it takes blocks of {_FLASH_KEYS} keys and of queries in multiples of {queries}, "
            f"not {layout.q_block} × {layout.kv_block}"
        )
    elif gradients and lse:
        reason = "its lse has no gradient"
    elif gradients and torch.are_deterministic_algorithms_enabled():
        reason = "its backward is not deterministic here, and deterministic algorithms are asked for"
    if reason is not None:
        raise ValueError(f"kernels.flex_backend is flash and {reason}; use kernels.flex_backend=triton")


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


@torch.compiler.disable  # a model compiled around it would compile it anew, without the options that let tiles fit
def _run(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, with_lse: bool) -> tuple[Tensor, ...]:
    """out, and the lse if asked for."""
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # on CPU it refuses what requires a gradient, wanted or not
    options = kernel_options(q, layout) if q.device.type == "cuda" else {}
    return _compiled(q.device.type)(q, k, v, block_mask(layout, q.shape[1]), scale, with_lse, options)


def kernel_options(q: Tensor, layout: BlockLayout) -> dict[str, Any]:
    """FlexAttention's options on CUDA: which kernel, and the Triton kernel's tiles."""
    if _kernel == "flash":
        return {"BACKEND": "FLASH"}
    capability = torch.cuda.get_device_capability(q.device)
    # TRITON: not its decoding kernel, which has tiles of its own.
    tiles = tile_options(layout.q_block, layout.kv_block, q.shape[-1], q.dtype, capability)
    return {"BACKEND": "TRITON", **tiles}


@cache
def _compiled(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    # On CPU PyTorch 2.13 writes C++ that does not compile for some lengths that vary: every shape has its own kernel.
    options, dynamic = (_WITHOUT_SEARCH, None) if device_type == "cuda" else (None, False)
    return torch.compile(  # type: ignore[call-overload]  # its overloads leave recompile_limit out
        _attend, fullgraph=True, options=options, dynamic=dynamic, recompile_limit=_COMPILATIONS
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
