"""Keys and values of the tokens one layer has read: what decoding token by token needs to remember."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Grows by doubling, so that decoding N tokens copies O(N) rows in all. No gradient passes through it.

    state  what the layer's attention core keeps beside keys and values (SequenceContext.states)
    """

    def __init__(self) -> None:
        self.length = 0  # tokens held
        self.state: dict[str, Tensor] = {}
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v [B, Hkv, Nq, D] (after RoPE) and returns all keys and values, [B, Hkv, length, D] each."""
        start, self.length = self.length, self.length + k.shape[2]
        self._k, self._v = _with_room(self._k, k, self.length), _with_room(self._v, v, self.length)
        self._k[:, :, start : self.length] = k
        self._v[:, :, start : self.length] = v
        return self._k[:, :, : self.length], self._v[:, :, : self.length]


def _with_room(buffer: Tensor | None, new: Tensor, length: int) -> Tensor:
    """The buffer, or a copy of at least twice its size where `length` tokens do not fit."""
    held = 0 if buffer is None else buffer.shape[2]
    if buffer is not None and length <= held:
        return buffer
    batch, heads, _, dim = new.shape
    larger = new.new_empty(batch, heads, max(length, 2 * held), dim)
    if buffer is not None:
        larger[:, :, :held] = buffer
    return larger
