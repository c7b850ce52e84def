"""Memory that training has freed, given back to the system: the C library keeps it in pieces that fit nothing else."""

from __future__ import annotations

import ctypes
import ctypes.util
from functools import lru_cache
from typing import Any


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
