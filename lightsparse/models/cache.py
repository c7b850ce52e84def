"""Keys and values of the tokens one layer has read: what decoding token by token needs to remember."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightsparse.attention.core import KeyExpiry


class Keys(NamedTuple):
    """What one pass of a layer reads."""

    k: Tensor  # [B, Hkv, n, D] after RoPE
    v: Tensor  # [B, Hkv, n, D]
    cached_block_ids: Tensor | None  # int64: the key blocks that k and v consist of ; None = all tokens


class KVCache:
    """Without key_expiry it keeps every token and grows by doubling: decoding N tokens copies O(N) rows in all.

    With key_expiry a block of keys goes as soon as no later query reads it, so that a window's cache stays as small as
    the window. Block numbers and positions stay what they were: only memory is given back.
    No gradient passes through it.

    length  tokens read
    state   what the layer's attention core keeps beside keys and values (SequenceContext.states)
    """

    def __init__(self, key_expiry: KeyExpiry | None = None) -> None:
        self.key_expiry = key_expiry
        self.length = 0
        self.state: dict[str, Tensor] = {}
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._count = 0  # tokens held
        self._blocks: list[int] = []  # their key blocks, with key_expiry
        self._ids: Tensor | None = None  # the same as a tensor, once some have gone

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> Keys:
        """Adds k, v [B, Hkv, Nq, D] (after RoPE) and returns what these Nq tokens and the ones before may read.

        Raises ValueError beyond the length that the key_expiry are for.
        """
        start, stop = self._count, self._count + k.shape[2]
        self._begin_blocks(k.shape[2], k.device)
        self.length += k.shape[2]
        self._k, self._v = (self._with_room(old, new, stop) for old, new in ((self._k, k), (self._v, v)))
        self._k[:, :, start:stop] = k
        self._v[:, :, start:stop] = v
        self._count = stop
        keys = Keys(self._k[:, :, :stop], self._v[:, :, :stop], self._ids)
        self._forget()
        return keys

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values and the core's state."""
        return sum(t.untyped_storage().nbytes() for t in (self._k, self._v, *self.state.values()) if t is not None)

    def _begin_blocks(self, new: int, device: torch.device) -> None:
        """Note the blocks that the next `new` tokens begin."""
        if self.key_expiry is None:
            return
        until, block, _ = self.key_expiry
        if self.length + new > until:
            raise ValueError(
                f"the cache was made for {until} tokens and is given {self.length + new}; make it with a larger `until`"
            )
        begun = range(-(-self.length // block), -(-(self.length + new) // block))
        self._blocks.extend(begun)
        if begun and self._ids is not None:
            self._ids = torch.tensor(self._blocks, device=device)

    def _with_room(self, buffer: Tensor | None, new: Tensor, stop: int) -> Tensor:
        """The buffer, or a larger copy where `stop` tokens do not fit."""
        room = 0 if buffer is None else buffer.shape[2]
        if buffer is not None and stop <= room:
            return buffer
        if self.key_expiry is None:
            room = max(stop, 2 * room)
        else:  # what forgets is copied once a block anyway
            room = -(-stop // self.key_expiry.block) * self.key_expiry.block
        batch, heads, _, dim = new.shape
        larger = new.new_empty(batch, heads, room, dim)
        if buffer is not None:
            larger[:, :, : self._count] = buffer[:, :, : self._count]
        return larger

    def _forget(self) -> None:
        """Drop the blocks that no query from the next token on reads. What was returned stays as it is."""
        if self.key_expiry is None:
            return
        _, block, last_row = self.key_expiry
        row = self.length // block  # of the next query
        kept = [last_row[number] >= row or number >= row for number in self._blocks]
        if all(kept):
            return
        assert self._k is not None and self._v is not None
        of_tokens = torch.tensor(kept).repeat_interleave(block)[: self._count].nonzero().flatten().to(self._k.device)
        self._k, self._v = (x[:, :, : self._count].index_select(2, of_tokens) for x in (self._k, self._v))
        self._count = len(of_tokens)
        self._blocks = [number for number, keep in zip(self._blocks, kept, strict=True) if keep]
        self._ids = torch.tensor(self._blocks, dtype=torch.int64, device=self._k.device)
