"""Buffers of one pass, kept for the next: a large temporary costs a page fault per 4 KiB whenever it is allocated.

Nothing that leaves a kernel (outputs, gradients, what autograd saves) lives here, so reuse can never change a result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_KEPT_BYTES = 128 << 20  # a larger buffer is freed after its pass
_local = threading.local()


class Workspace:
    """Flat buffers by name, each as large as the largest asked for. One per thread, so that no two passes share it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.allocations = 0  # of buffers, since the start

    def take(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised [size]; the next call with this name may hand out the same memory."""
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # a buffer first made in an evaluation must serve training too
                buffer = torch.empty(size, dtype=dtype, device=device)
            self.allocations += 1
            if _reuse() and buffer.nbytes <= _KEPT_BYTES:
                self._buffers[key] = buffer
        return buffer[:size]

    def clear(self) -> None:
        self._buffers.clear()


def workspace() -> Workspace:
    """This thread's."""
    if not hasattr(_local, "workspace"):
        _local.workspace = Workspace()
    return _local.workspace


@contextmanager
def without_reuse() -> Iterator[None]:
    """Every pass of this thread allocates anew: to show that reuse changes nothing, and what it saves."""
    workspace().clear()
    _local.reuse = False
    try:
        yield
    finally:
        _local.reuse = True


def _reuse() -> bool:
    return getattr(_local, "reuse", True)
