"""The yardstick of `bench kernels`, dense causal SDPA, and what a contender's time says beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, current_flash_attention_impl

from lightsparse.bench.options import DTYPES
from lightsparse.bench.report import Row
from lightsparse.bench.timing import Lap, cpu_speedup, median_ms, speedup
from lightsparse.kernels.compute_dtype import compute_dtype
from lightsparse.utils.compat.torch import fused_attention_kernel


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, N, D], k, v [B, Hkv, N, D] → [B, H, N, D]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


_KERNELS = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}


def dense_kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The kernel that `dense` takes for these: flash, cuDNN, efficient or math; FA3 or FA4 where put in flash's place.

    They differ by a factor of two on one GPU, so that a speedup says nothing without it.
    """
    taken = fused_attention_kernel(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    name = _KERNELS.get(taken, taken.name.lower())
    replaced = current_flash_attention_impl() if q.device.type == "cuda" else None
    return replaced or name if name == "flash" else name


def compared(laps: list[Lap], baseline: list[Lap], density: float) -> Row:
    """The result columns of a row, from the laps of a contender and of dense attention in the same rounds."""
    ratio = speedup(laps, baseline)
    return {
        "ms": median_ms(laps),
        "dense_ms": median_ms(baseline),
        "speedup": ratio,
        "cpu_speedup": cpu_speedup(laps, baseline),
        "flop_ratio": 1 / density,
        "efficiency": ratio * density,
    }


def product_notes(dtypes: Sequence[str]) -> list[str]:
    """In which dtype our kernel multiplies on this machine, where that is not a matter of course."""
    if "bf16" not in dtypes:
        return []
    products = compute_dtype(DTYPES["bf16"], torch.device("cpu"))
    name = next(name for name, dtype in DTYPES.items() if dtype is products)
    return [
        f"native multiplies bf16 inputs in fp32, and weights and their gradients in fp16 where the CPU can; blocked "
        f"multiplies on this CPU in {name}, chosen by the kind of CPU (lightsparse/kernels/compute_dtype.py)."
    ]
