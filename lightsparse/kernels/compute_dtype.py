"""In which dtype half-precision inputs are multiplied: where the hardware gains nothing from bf16, in fp32."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products over inputs of `dtype`; sums and softmax are fp32 either way.

    It depends on the machine's kind only, never on a measurement, so that a resumed run computes the same bits.
    """
    if dtype not in (torch.bfloat16, torch.float16) or device.type != "cpu":
        return dtype
    return dtype if dtype is torch.bfloat16 and _multiplies_bf16_faster() else torch.float32


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that sums over inputs like x are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def default_precision() -> str:
    """What `precision: null` means on this machine: bf16-mixed where it multiplies bf16 faster than fp32, else 32."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    return "bf16-mixed" if _multiplies_bf16_faster() else "32"


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of the matrix products of a model that is trained at a `precision` of the config."""
    if precision == "bf16-mixed":
        return compute_dtype(torch.bfloat16, device)
    return torch.float32 if precision == "32" else torch.bfloat16


def as_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's dtype where autocast is on, else as it is."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def keeps_fp32(device: torch.device) -> bool:
    """Whether matrix products under autocast stay in fp32 because this CPU takes longer for them in autocast's dtype.

    What is kept between them, q, k and v above all, has autocast's dtype all the same. False without autocast.
    """
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return _cpu_product_dtype(torch.get_autocast_dtype("cpu")) is torch.float32


@torch.compiler.assume_constant_result
def _cpu_product_dtype(dtype: torch.dtype) -> torch.dtype:
    return compute_dtype(dtype, torch.device("cpu"))


@lru_cache(maxsize=1)
def _multiplies_bf16_faster() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones.

    AMX does. Zen 4 and 5 run VDPBF16PS at the rate of an fp32 FMA (measured on one core: bf16 340-430 GFLOP/s, fp32
    84-227). Intel without AMX runs it at half that rate (measured: bf16 78 GFLOP/s, fp32 100-150).
    """
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return False
    text = path.read_text().split("\n\n")[0]
    flags = set(text.split())
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in flags)
