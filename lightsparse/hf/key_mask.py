"""Who may read whom, as transformers hands it to our attention: one number per key in place of an N × N mask.

transformers asks a mask function registered under the name of an attention for a mask, once per pass, and hands the
answer to the attention of every layer. Ours is int32 [B|1, 1, 1, keys]: the document of each key (0, 1, 2, …, read from
packed position_ids), HIDDEN for padding, UNWRITTEN for what a static cache has room for.
`parts_of` turns it back into what a core understands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightsparse.attention.core import SequenceContext
from lightsparse.patterns.mask import document_starts
from lightsparse.utils.compat.torch import WeakTensorKeyDictionary
from lightsparse.utils.compat.transformers import causal_mask_function

HIDDEN, UNWRITTEN = -1, -2
_REPLACED = (
    "which lightsparse would replace; use sdpa, or set config.sliding_window=None (and layer_types to full_attention) "
    "where that is meant"
)


@torch.compiler.disable  # values decide what is read
def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    config: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
) -> Tensor:
    """The mask of a pass, int32 [B|1, 1, 1, kv_length]. transformers calls it; dtype, config and allow_… say nothing.

    attention_mask  bool [B, tokens so far]: False hides a token
    mask_function   mask_function(sample, head, query, key), of which only causality within documents is accepted
    Raises ValueError for masks of any other form, and for caches that forget their first tokens.
    """
    if int(kv_offset):
        raise ValueError(
            f"the cache has forgotten its first {int(kv_offset)} tokens; a pattern counts from the first one, so give "
            "a DynamicCache or StaticCache that keeps all, without sliding windows"
        )
    if local_size is not None:
        raise ValueError(f"the model's attention is local, {local_size} tokens wide, {_REPLACED}")
    if use_vmap:
        raise ValueError("the model adds a mask of its own to causality; lightsparse has no room for it, use sdpa")
    start = int(q_offset)
    written = start + q_length
    documents = torch.zeros(1, kv_length, dtype=torch.int32, device=device)
    if mask_function is not causal_mask_function:
        documents = _documents(mask_function, batch_size, start, written, kv_length, device)
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; lightsparse takes one number per token, [B, tokens]"
            )
        seen = attention_mask[:, :kv_length].to(device=device, dtype=torch.bool)
        shown = torch.zeros(len(seen), kv_length, dtype=torch.bool, device=device)
        shown[:, : seen.shape[1]] = seen
        documents = torch.where(shown, documents, HIDDEN)
    documents[:, written:] = UNWRITTEN
    return documents[:, None, None]


def _documents(
    mask_function: Callable[..., Any], batch: int, start: int, stop: int, keys: int, device: torch.device | str
) -> Tensor:
    """The document of each key, int32 [batch, keys], found by asking about neighbours and about first tokens."""
    sample, head = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.int64, device=device)
    query = torch.arange(max(start, 1), stop, device=device)[None]

    def may_read(query: Tensor, key: Tensor) -> Tensor:
        return torch.as_tensor(mask_function(sample, head, query, key), device=device).expand(batch, query.shape[1])

    documents = torch.zeros(batch, keys, dtype=torch.int32, device=device)
    begins = ~may_read(query, query - 1)
    documents[:, max(start, 1) : stop] = begins.cumsum(1)
    first = document_starts(documents[:, :stop])[:, max(start, 1) :].long()
    if bool(may_read(query - 1, query).any()):
        raise ValueError("the model's mask lets tokens read later ones; lightsparse is causal there, use sdpa")
    if not bool(may_read(query, first).all()) or bool((may_read(query, first - 1) & (first > 0)).any()):
        raise ValueError(f"the model's mask is a pattern of its own, {_REPLACED}")
    return documents


@dataclass(frozen=True, eq=False)
class Part:
    """Samples that a core takes in one call, on keys `first` … `stop` − 1.

    samples  int64 [S], or None for the whole batch
    skipped  leading queries that are padding and read nothing
    """

    samples: Tensor | None
    first: int
    stop: int
    skipped: int
    ctx: SequenceContext


_PARTS = WeakTensorKeyDictionary()  # of the masks that are in use: layers share their parts, and so their layouts


def parts_of(
    mask: Tensor | None, queries: int, keys: int, positions: Tensor | None, device: torch.device
) -> list[Part]:
    """How to attend `queries` tokens, the last of those written, over a cache of `keys`.

    mask       what `key_mask` returned, or None for causality alone
    positions  position_ids [B|1, queries], or None
    Padding on the left is cut off sample by sample, so that a padded sample gives exactly what it gives alone whatever
    its pattern's blocks; padding on the right needs nothing, because no token before it reads it. Raises ValueError for
    other masks, gaps between visible tokens, and positions that restart where no document begins.
    """
    if mask is None:
        documents = torch.zeros(1, keys, dtype=torch.int32, device=device)
        return _parts(documents, queries, positions)
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] != keys:
        raise ValueError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)} for {keys} keys; lightsparse takes one number per "
            "token, [B, tokens], and builds no N × N mask"
        )
    if mask not in _PARTS:
        _PARTS[mask] = _parts(mask[:, 0, 0], queries, positions)
    return _PARTS[mask]


def _parts(documents: Tensor, queries: int, positions: Tensor | None) -> list[Part]:
    """documents [B|1, keys], with HIDDEN and UNWRITTEN."""
    stop = int((documents[0] != UNWRITTEN).sum())
    documents = documents[:, :stop]
    start, shown = stop - queries, documents >= 0
    if start < 0:
        raise ValueError(f"there are {queries} queries and {stop} keys; attention to another sequence needs sdpa")
    _check_positions(documents, positions, start)
    index = torch.arange(stop, device=documents.device)
    first = torch.where(shown, index, stop).amin(1)
    last = torch.where(shown, index, -1).amax(1)
    if not bool((shown.sum(1) == (last + 1 - first).clamp(min=0)).all()):
        raise ValueError(
            "attention_mask hides tokens between visible ones; lightsparse takes padding at the ends only: pad prompts "
            "on the left before generate()"
        )
    if bool((documents.amax(1) > 0).any()):
        if not bool(shown.all()):
            raise ValueError("attention_mask hides tokens of a packed batch; give either padding or packed documents")
        starts = document_starts(documents)
        return [Part(None, 0, stop, 0, SequenceContext((index - starts)[:, start:], documents, start))]
    parts = []
    for pad in first.unique().tolist():
        if pad == stop:  # nothing but padding
            continue
        samples = None if bool((first == pad).all()) else (first == pad).nonzero().flatten()
        begin = max(start - pad, 0)
        positions_here = torch.arange(begin, stop - pad, device=documents.device)[None]
        parts.append(Part(samples, pad, stop, max(pad - start, 0), SequenceContext(positions_here, None, begin)))
    return parts


def _check_positions(documents: Tensor, positions: Tensor | None, start: int) -> None:
    """Only without attention_mask and cache does transformers read packing from position_ids; else it would be lost."""
    if positions is None or positions.dim() != 2 or positions.shape[1] != documents.shape[1] - start:
        return
    here = documents[:, start:]
    goes_on = (here[:, 1:] == here[:, :-1]) & (here[:, 1:] >= 0)
    if bool((goes_on & (positions[:, 1:] <= positions[:, :-1])).any()):
        raise ValueError(
            "position_ids restart inside a sample that counts as one document; for packed documents leave "
            "attention_mask out and give use_cache=False"
        )
