"""Memory that training has freed: kept for the next tensors while it trains, given back between its parts."""

from __future__ import annotations

import ctypes
import ctypes.util
from functools import lru_cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_freed() -> bool:
    """From now on this process keeps what it frees and makes its next tensors of it; False where that is not glibc's.

    Else glibc maps every tensor above 32 MiB anew and the system zeroes its pages one by one: a tenth to a quarter of a
    training step of 65,536 tokens. What is kept lies in pieces that do not always fit: peaks have grown by up to 1.26
    times.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1))


def release_freed() -> None:
    """Give free pages back, where the C library is glibc; elsewhere it does so by itself, or cannot be asked.

    Between training and validation, whose tensors have other sizes: without it the second's stand beside the holes of
    the first, and the peak of a run is that of both together.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@lru_cache(maxsize=1)
def _glibc() -> Any:
    name = ctypes.util.find_library("c")
    library = ctypes.CDLL(name) if name else None
    return library if hasattr(library, "malloc_trim") else None
