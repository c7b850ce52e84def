"""What this device's matrix product can do, measured: the denominator of MFU, and the error of its fp32 setting."""

from __future__ import annotations

import time

import torch

_SECONDS = 0.2  # of measuring, after a warm-up


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product in `dtype`, the best of what fits in a fifth of a second.

    Under the float32 matmul precision and the number of threads in force, so that MFU compares like with like.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(2):
        _timed_product(a, b)
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        fastest = min(fastest, _timed_product(a, b))
    return 2 * size**3 / fastest


def matmul_error(device: torch.device) -> float:
    """Relative error of an fp32 matrix product against fp64 under the float32 matmul precision in force.

    About 1e-6 is full fp32, 1e-3 means that the factors were rounded to bf16 or tf32 ("high" and "medium" allow it).
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, dtype=torch.float64, generator=generator) for _ in range(2))
    exact = a @ b
    product = (a.float().to(device) @ b.float().to(device)).cpu().double()
    return float((product - exact).norm() / exact.norm())


def _timed_product(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    a @ b
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    elif a.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start
