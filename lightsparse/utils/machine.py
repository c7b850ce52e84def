"""What a measurement ran on, and peak memory of a call in a fresh process."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil
import torch

P = ParamSpec("P")
T = TypeVar("T")

MIB = 2**20
# The instruction sets that decide matmul speed.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def hardware() -> dict[str, object]:
    """CPU model, its flags of interest, usable cores, memory, the accelerator if any, and the load before the run."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    names = {"python": platform.python_version(), "os": f"{platform.system()} {platform.release()}"}
    for package in ("lightsparse", "torch", "transformers"):
        try:
            names[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            names[package] = "not installed"
    return names


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes.

    Not ru_maxrss where /proc exists: Linux hands a parent's ru_maxrss on to the child, which would hide an increase.
    """
    high_water = _status_kib("VmHWM")
    if high_water is not None:
        return high_water * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss() -> int:
    """Resident memory of this process now, bytes."""
    return psutil.Process().memory_info().rss


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """function(…) in a fresh process that ends with it, so that its peak memory is its own.

    Raises concurrent.futures.process.BrokenProcessPool when the child is killed, for want of memory say.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _status_kib(name: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return None
