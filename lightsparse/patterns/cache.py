"""Layouts that outlive a forward pass: built once per pattern and shape, least recently used out first.

A layout without packed documents depends on numbers alone (LayoutKey), so every layer and every step of a run reads the
same object. With documents it depends on the batch: LayoutKey.build(documents) makes it, and it is not kept here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock, RLock

import torch
from torch import Tensor

from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.pattern import Pattern

Finish = Callable[[BlockLayout, Pattern, Tensor | None], BlockLayout]


def unchanged(layout: BlockLayout, pattern: Pattern, documents: Tensor | None) -> BlockLayout:
    return layout


@dataclass(frozen=True)
class LayoutKey:
    """All that a layout without documents depends on; see Pattern.layout for the fields."""

    pattern: Pattern
    seq_len: int  # tokens
    block: int  # tokens
    heads: int
    kv_heads: int
    causal: bool
    device: torch.device
    rows: range  # query blocks

    def __post_init__(self) -> None:
        # "cuda" is whichever device is current; a key must always name the same one.
        object.__setattr__(self, "device", torch.empty(0, device=self.device).device)

    def build(self, documents: Tensor | None = None) -> BlockLayout:
        return self.pattern.layout(
            self.seq_len,
            block=self.block,
            heads=self.heads,
            kv_heads=self.kv_heads,
            causal=self.causal,
            device=self.device,
            rows=self.rows,
            documents=documents,
        )


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made (clear() keeps them) and what it holds now."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0  # entries that made room for others; clear() evicts nothing
    entries: int = 0
    bytes: int = 0

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class PersistentPatternCache:
    """Layouts by LayoutKey, every device with its own list of recent use and its own bounds. Thread-safe.

    max_entries  layouts kept per device
    max_bytes    bytes of their tensors per device; a layout larger than that is built, returned and not kept
    Raises ValueError for bounds below 1.
    """

    def __init__(self, max_entries: int = 128, max_bytes: int = 1 << 28):
        for name, value in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; a cache that keeps nothing is no cache, it must be at least 1")
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self._shelves: dict[torch.device, _Shelf] = {}
        self._lock = Lock()  # guards the dictionary of shelves only

    @torch.compiler.disable  # a compiled model looks the layout up; it does not trace how one is built
    def layout(self, key: LayoutKey, finish: Finish = unchanged) -> BlockLayout:
        """The layout of `key` after finish(layout, pattern, None), which counts as part of the key; built if missing.

        Two threads that ask for the same new layout build it once: the second waits, and hits.
        """
        with self._lock:
            shelf = self._shelves.setdefault(key.device, _Shelf(self.max_entries, self.max_bytes))
        return shelf.layout(key, finish)

    def stats(self, device: torch.device | str | None = None) -> CacheStats:
        """Of one device, or of all together."""
        return sum((shelf.stats() for shelf in self._on(device)), CacheStats())

    def clear(self, device: torch.device | str | None = None) -> None:
        """Forget the layouts of one device, or all."""
        for shelf in self._on(device):
            shelf.clear()

    def _on(self, device: torch.device | str | None) -> list[_Shelf]:
        with self._lock:
            if device is None:
                return list(self._shelves.values())
            found = self._shelves.get(torch.empty(0, device=device).device)
            return [] if found is None else [found]


class _Shelf:
    """The layouts on one device, oldest use first. One lock over look-up and building, so that counts are exact."""

    def __init__(self, max_entries: int, max_bytes: int):
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.held: OrderedDict[tuple[LayoutKey, Finish], tuple[BlockLayout, int]] = OrderedDict()
        self.hits = self.misses = self.evictions = self.bytes = 0
        self.lock = RLock()  # a `finish` may ask for another layout

    def layout(self, key: LayoutKey, finish: Finish) -> BlockLayout:
        with self.lock:
            found = self.held.get((key, finish))
            if found is not None:
                self.hits += 1
                self.held.move_to_end((key, finish))
                return found[0]
            self.misses += 1
            with torch.inference_mode(False):  # a layout first built while evaluating serves training too
                layout = finish(key.build(), key.pattern, None)
            size = size_in_bytes(layout)
            if size <= self.max_bytes:
                self.held[key, finish] = (layout, size)
                self.bytes += size
            while len(self.held) > self.max_entries or self.bytes > self.max_bytes:
                _, (_, freed) = self.held.popitem(last=False)
                self.bytes -= freed
                self.evictions += 1
            return layout

    def stats(self) -> CacheStats:
        with self.lock:
            return CacheStats(self.hits, self.misses, self.evictions, len(self.held), self.bytes)

    def clear(self) -> None:
        with self.lock:
            self.held.clear()
            self.bytes = 0


def size_in_bytes(layout: BlockLayout) -> int:
    """Memory that a layout keeps alive: a view keeps all of its storage, and tensors that share one count once.

    Includes `full_tiles`, one byte per entry of the table, which appears at its first use.
    """
    mask = layout.mask
    tensors = (layout.kv_indices, layout.dense_rows, *(vars(mask).values()))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values()) + layout.kv_indices.numel()
