"""The residual stream between layers in main memory, copied beside the computation.

With activation checkpointing a layer keeps its input [B, N, E] for the backward pass. Here that input starts for pinned
main memory when the layer starts, is gone from the device once the next layer starts, and returns while the layer
behind it is recomputed. The last layer's input stays where it is: its backward pass is the first.

torch.autograd.graph.save_on_cpu(pin_memory=True) moves the same tensors, but in the stream of the computation, which
then stands still for each copy, both ways; and around a whole layer its hooks would move what a kernel keeps as well.

On the device at a time, beside the last layer's: the input of the layer at work and, in the backward pass, the next.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Copies(Protocol):
    """What moves tensors beside the computation. A mark stands for the end of one copy."""

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        """Start a copy of x to main memory: (it, its mark). x must not be let go before `wait` for the mark."""

    def back(self, there: Tensor) -> tuple[Tensor, Any]:
        """Start a copy of what `out` made to the device: (it, its mark). Not to be read or let go before `wait`."""

    def wait(self, mark: Any) -> None:
        """Have what is computed from now on come after the copy."""


class SideStream:
    """Copies in a stream of their own. The host never waits.

    All device memory belongs to the stream of the computation, which waits for a copy before it lets a tensor go. The
    other way, `Tensor.record_stream`, would let the allocator take new memory for every layer that the host is ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.runtime = device, torch.get_device_module(device)
        self.stream = self.runtime.Stream(device)

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        return self._copied(x, self.pinned_like(x))

    def back(self, there: Tensor) -> tuple[Tensor, Any]:
        return self._copied(there, torch.empty_like(there, device=self.device))

    def wait(self, mark: Any) -> None:
        self.runtime.current_stream(self.device).wait_event(mark)

    def pinned_like(self, x: Tensor) -> Tensor:
        """Main memory for x, with its strides: the same bits in the same order."""
        return torch.empty_like(x, device="cpu", pin_memory=True)

    def _copied(self, source: Tensor, target: Tensor) -> tuple[Tensor, Any]:
        # x is computed, and the memory of what comes back is free, only where the computation has got to by now.
        self.stream.wait_stream(self.runtime.current_stream(self.device))
        with self.runtime.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return target, self.stream.record_event()


@cache
def _side_stream(device: torch.device) -> SideStream:
    """One of each device for all passes: copies of one pass never overtake those of another."""
    return SideStream(device)


def copies_of(device: torch.device) -> Copies:
    """What moves tensors between this device and main memory. Raises ValueError where the two are the same."""
    if device.type != "cuda":
        raise ValueError(
            f"model.activation_checkpointing is offload and the model is on {device.type}, which has no other memory "
            "than the main one; use model.activation_checkpointing=true, or CUDA"
        )
    return _side_stream(device)


class KeptInput:
    """The input of one layer until its backward pass, in main memory or, where it stays, with whoever keeps it."""

    def __init__(self, copies: Copies, there: Tensor | None, before: KeptInput | None) -> None:
        self.copies, self.there, self.before = copies, there, before
        self._coming: tuple[Tensor, Any] | None = None  # the copy on its way to the device

    @property
    def stays(self) -> bool:
        return self.there is None

    def back(self, here: Tensor | None) -> Tensor:
        """The input on the device: `here` where it stays. Of the layer before, it starts to come."""
        self._fetch()
        if self.before is not None:
            self.before._fetch()
        if self._coming is None:
            assert here is not None
            return here
        (x, mark), self._coming = self._coming, None
        self.copies.wait(mark)
        return x

    def _fetch(self) -> None:
        if self.there is not None and self._coming is None:
            self._coming = self.copies.back(self.there)

    def __del__(self) -> None:
        # A backward pass that ended early: the computation may have the memory only once nothing is copied into it.
        if self._coming is not None:
            self.copies.wait(self._coming[1])


class KeptInputs:
    """The inputs of the layers of one forward pass, the first layer first."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self._last: KeptInput | None = None
        self._leaving: tuple[Tensor, Any] | None = None  # still on the device, and the mark of its copy

    @torch.no_grad()
    def keep(self, x: Tensor, *, stays: bool) -> KeptInput:
        """Keep one more; one that stays is left to the caller, and nothing is on its way after it."""
        if self._leaving is not None:
            self.copies.wait(self._leaving[1])
            self._leaving = None
        there = None
        if not stays:
            x = x.detach()
            there, mark = self.copies.out(x)
            self._leaving = x, mark
        self._last = KeptInput(self.copies, there, self._last)
        return self._last


Keep = Callable[[Tensor], KeptInput]  # KeptInputs.keep for one layer


def kept_by(keep: Keep) -> AbstractContextManager[Any]:
    """Within, what autograd saves is kept by `keep`: around torch.utils.checkpoint, which saves a function's inputs.

    The function itself runs under the checkpoint's own hooks, so that nothing of it comes here.
    """

    def pack(x: Tensor) -> tuple[KeptInput, Tensor | None]:
        kept = keep(x)
        return kept, (x if kept.stays else None)

    def unpack(packed: tuple[KeptInput, Tensor | None]) -> Tensor:
        kept, here = packed
        return kept.back(here)

    return saved_tensors_hooks(pack, unpack)
