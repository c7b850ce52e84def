"""The token-level rule inside chosen blocks: each key carries the interval of query positions that may read it.

    mask(i, j) = visible_from[j] <= q_pos[i] < visible_until[j]  and  q_doc[i] == kv_doc[j]

Windows, sinks, causality, padding and pooled levels are all this one rule. It is also FlexAttention's
`mask_mod` signature, so the same object serves every backend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALWAYS = torch.iinfo(torch.int32).max  # a key visible until ALWAYS never closes; visible from ALWAYS never opens
NEVER = torch.iinfo(torch.int32).min


@dataclass(frozen=True, eq=False)
class ElementMask:
    """Visibility intervals of the keys, in positions of the (packed) sequence.

    q_pos                        int32 [B|1, Nq]: position of each query
    visible_from, visible_until  int32 [B|1, Nkv]: the half-open interval of query positions that may read the key
    q_doc, kv_doc                int32 [B|1, Nq], [B|1, Nkv]: document ids, or None when all is one document
    dense                        [B|1, H|1, Nq, Nkv] bool (True = may read) or float (added to the scores), optional;
                                 only the backends `reference` and `blocked` take it
    causal                       whether dense attention over the same documents would be causal; density counts
                                 against that
    num_tokens                   leading keys that are tokens, where keys are appended (summaries, each segment padded
                                 to whole blocks); None = all keys. Dense attention reads only tokens
    """

    q_pos: Tensor
    visible_from: Tensor
    visible_until: Tensor
    q_doc: Tensor | None = None
    kv_doc: Tensor | None = None
    dense: Tensor | None = None
    causal: bool = True
    num_tokens: int | None = None

    @property
    def num_queries(self) -> int:
        return self.q_pos.shape[-1]

    @property
    def num_keys(self) -> int:
        return self.visible_from.shape[-1]

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """FlexAttention's `mask_mod(b, h, q_index, kv_index)`: True where query i may read key j (ignores `dense`)."""

        def at(values: Tensor, index: Tensor) -> Tensor:
            return values[b % values.shape[0], index]  # each has its own batch dimension, 1 or B

        position = at(self.q_pos, i)
        allowed = (at(self.visible_from, j) <= position) & (position < at(self.visible_until, j))
        if self.q_doc is not None and self.kv_doc is not None:
            allowed = allowed & (at(self.q_doc, i) == at(self.kv_doc, j))
        return allowed

    def to_dense(self) -> Tensor:
        """Bool [B|1, 1, Nq, Nkv]. Quadratic: for tests, pictures and the `reference` backend only."""
        position = self.q_pos[:, None, :, None]
        allowed = (self.visible_from[:, None, None, :] <= position) & (position < self.visible_until[:, None, None, :])
        if self.q_doc is not None and self.kv_doc is not None:
            allowed = allowed & (self.q_doc[:, None, :, None] == self.kv_doc[:, None, None, :])
        return allowed

    def queries(self, start: int, stop: int) -> ElementMask:
        """The same rule for queries start … stop − 1 only (decoding)."""
        return self.of_queries(slice(start, stop))

    def of_queries(self, which: slice | Tensor) -> ElementMask:
        """The same rule for some of the queries."""
        return replace(
            self,
            q_pos=self.q_pos[:, which],
            q_doc=None if self.q_doc is None else self.q_doc[:, which],
            dense=None if self.dense is None else self.dense[:, :, which],
        )

    @property
    def device(self) -> torch.device:
        return self.q_pos.device


def interval_mask(
    num_keys: int,
    *,
    q_start: int = 0,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    documents: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> ElementMask:
    """The mask of self-attention over `num_keys` tokens, queries q_start … num_keys − 1.

    window     tokens: a query reads keys with 0 ≤ i − j < window (causal) or |i − j| < window; None = no window
    sinks      the first `sinks` tokens of every document stay visible whatever the window
    documents  int32 [B, num_keys], non-decreasing along the sequence; tokens read only their own document
    Raises ValueError for a window below 1, negative sinks or decreasing document ids.
    """
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a window counts tokens and must be at least 1")
    if sinks < 0:
        raise ValueError(f"sinks is {sinks}; it counts tokens and must be at least 0")
    starts = None if documents is None else document_starts(documents.to(device))
    position = torch.arange(num_keys, dtype=torch.int32, device=device)[None]
    visible_from = position if causal else torch.full_like(position, NEVER)
    visible_until = torch.full_like(position, ALWAYS)
    if window is not None:
        window = min(window, num_keys)  # the sum below stays within int32
        visible_until = position + window
        if not causal:
            visible_from = position - (window - 1)
    if window is not None and sinks:
        since_start = position - (0 if starts is None else starts)
        is_sink = since_start < sinks
        visible_until = torch.where(is_sink, ALWAYS, visible_until)
        if not causal:
            visible_from = torch.where(is_sink, NEVER, visible_from)
    docs = None if documents is None else documents.to(device=device, dtype=torch.int32)
    return ElementMask(
        q_pos=position[:, q_start:],
        visible_from=visible_from,
        visible_until=visible_until,
        q_doc=None if docs is None else docs[:, q_start:],
        kv_doc=docs,
        causal=causal,
    )


def document_starts(documents: Tensor) -> Tensor:
    """Position of the first token of each token's document: int32 [B, N] for document ids [B, N].

    Raises ValueError if ids decrease along the sequence: a document must be one contiguous run.
    """
    if bool((documents[:, 1:] < documents[:, :-1]).any()):
        raise ValueError("document ids decrease along the sequence; number the packed documents 0, 1, 2, … in order")
    position = torch.arange(documents.shape[1], dtype=torch.int32, device=documents.device).expand(documents.shape)
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(is_start, position, 0).cummax(dim=1).values.to(torch.int32)
