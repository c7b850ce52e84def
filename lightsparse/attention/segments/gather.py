"""The dense segments of a dilated branch: kept tokens gathered side by side (LongNet, arXiv 2307.02486, section 2.2).

A branch (w, r) cuts every document in segments of w tokens; key/value head g keeps the positions of a segment that are
≡ g (mod r), queries and keys alike, and every kept token reads the kept tokens of its segment. Gathered side by side in
slots, that is dense attention over short documents, so a BlockLayout over the slots says all of it.

With a pattern, each of its blocks has its own run of slots, as many as the fullest block needs: slot blocks and token
blocks then correspond one to one, and the intersection is exact for every w, r and document border. Spare slots are
hidden from all queries, and what they compute as queries is dropped.

Names: B samples (1 where all have the same slots), N keys, h key/value heads of one gather, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightsparse.patterns import BlockGrid, BlockLayout, LocalWindow, Pattern, interval_mask
from lightsparse.patterns.grid import compact
from lightsparse.patterns.layout import no_dense_rows
from lightsparse.patterns.mask import ALWAYS, document_starts


@dataclass(frozen=True)
class Branch:
    """One (w, r) and the key/value heads that take it."""

    segment: int  # tokens
    rate: int  # every rate-th token of a segment is kept
    kv_heads: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """What the gathers of a pass depend on beside its documents. Queries are tokens q_start … num_keys − 1."""

    num_keys: int
    q_start: int
    heads: int
    kv_heads: int
    causal: bool
    block: int  # tokens per tile; with a pattern, per block of its grid
    pattern: Pattern | None
    device: torch.device


@dataclass(frozen=True, eq=False)
class Gather:
    """Heads of one branch whose slots have the same layout.

    kv_heads   int64 [h]
    positions  int64 [B|1, h, S]: the token of the sequence in each slot, −1 in a spare one;
               None = for all heads the slots are tokens N − S … N − 1
    layout     attention over the slots; its queries are the last ones
    """

    kv_heads: Tensor
    positions: Tensor | None
    layout: BlockLayout

    @property
    def area(self) -> Tensor:
        """Query–key area of the computed tiles, summed over the key/value heads: fp64 [B|1]."""
        return self.layout.areas()[0].mean(1) * len(self.kv_heads)


def gathers(branch: Branch, sizes: Sizes, documents: Tensor | None) -> list[Gather]:
    """The gathers of one branch: one where all residues keep equally many tokens everywhere, at most one per residue.

    documents  int32 [B, N] or None, non-decreasing; segments and residues count from the document's start
    Heads that keep none of the queries are left out. Time and memory O(n · residues), beside the layouts, for the n
    tokens from the segment of the first query on; all N with a pattern.
    """
    first, since_start = _segments_to_come(branch, sizes, documents)
    in_segment = since_start % branch.segment
    segment_BN = (in_segment == 0).cumsum(1).to(torch.int32)
    table = None if sizes.pattern is None else _pattern_table(branch, sizes, documents, segment_BN)
    sizes = replace(sizes, num_keys=sizes.num_keys - first, q_start=sizes.q_start - first)

    same: list[tuple[_Slots, list[int], list[Tensor]]] = []  # slots, key/value heads, the positions of each
    for residue in sorted({head % branch.rate for head in branch.kv_heads}):
        kept_BN = in_segment % branch.rate == residue
        if not bool(kept_BN[:, sizes.q_start :].any()):
            continue
        positions_BS, slots = _slots(kept_BN, segment_BN, sizes)
        heads = [head for head in branch.kv_heads if head % branch.rate == residue]
        of_slots = next((entry for entry in same if entry[0].equals(slots)), None)
        if of_slots is None:
            same.append(of_slots := (slots, [], []))
        of_slots[1].extend(heads)
        of_slots[2].extend([torch.where(positions_BS < 0, -1, positions_BS + first)] * len(heads))

    in_place = branch.rate == 1 and len(branch.kv_heads) == sizes.kv_heads
    return [
        Gather(
            torch.tensor(heads, device=sizes.device),
            None if in_place else torch.stack(positions, 1),
            _layout(slots, branch, sizes, None if table is None else _of_heads(table, heads, sizes)),
        )
        for slots, heads, positions in same
    ]


def last_rows(lengths: Sequence[int], until: int, block: int, documents: Tensor | None) -> list[int]:
    """Of each block of the first `until` tokens, the last block that shares a segment of some length with it.

    documents  int32 [B, until] or None
    """
    index = torch.arange(until)
    starts = torch.zeros(1, until, dtype=torch.int64) if documents is None else document_starts(documents.cpu())
    last_BN = torch.stack([index + (length - 1 - (index - starts) % length) for length in lengths]).amax(0)
    borders = torch.where(starts == index, index, until)[:, 1:].flip(1).cummin(1).values.flip(1)
    ends_BN = torch.nn.functional.pad(borders, (0, 1), value=until) - 1  # a document ends its segments
    last_N = torch.nn.functional.pad(last_BN.minimum(ends_BN).amax(0), (0, -until % block))
    return (last_N.view(-1, block).amax(1) // block).tolist()


def _segments_to_come(branch: Branch, sizes: Sizes, documents: Tensor | None) -> tuple[int, Tensor]:
    """The first token that some query's segment can hold, and since where in its document each token from there stands.

    (first, int64 [B|1, N − first]). With a pattern every token has slots: first is 0.
    """
    starts = None if documents is None else document_starts(documents)
    first = 0
    if sizes.q_start and sizes.pattern is None:
        since_start = sizes.q_start if starts is None else sizes.q_start - starts[:, sizes.q_start]
        first = int(torch.as_tensor(sizes.q_start - since_start % branch.segment).min())
    index = torch.arange(first, sizes.num_keys, device=sizes.device)
    return first, (index if starts is None else index - starts[:, first:]).view(-1, len(index))


@dataclass(frozen=True, eq=False)
class _Slots:
    """What a layout needs to know of the slots; heads for which it is the same share one gather.

    segment  int32 [B|1, S], non-decreasing: the segment of each slot's token; a spare slot has that of the slot before
    spare    bool [B|1, S]
    """

    segment: Tensor
    spare: Tensor
    block: int  # slots per block of the layout
    first_query: int

    def equals(self, other: _Slots) -> bool:
        return (
            (self.block, self.first_query) == (other.block, other.first_query)
            and torch.equal(self.segment, other.segment)
            and torch.equal(self.spare, other.spare)
        )


def _slots(kept_BN: Tensor, segment_BN: Tensor, sizes: Sizes) -> tuple[Tensor, _Slots]:
    """The token in each slot (−1 = none), int64 [B|1, S], and the slots' form. Kept tokens stand in order."""
    batch, n = kept_BN.shape
    run = n if sizes.pattern is None else sizes.block  # tokens that have a run of slots of their own
    kept_BRT = torch.nn.functional.pad(kept_BN, (0, -n % run)).unflatten(1, (-1, run))
    kept_per_run = kept_BRT.sum(-1)
    width = int(kept_per_run.max())  # slots of a run
    in_run = kept_BRT.cumsum(-1) - 1 + torch.arange(kept_BRT.shape[1], device=sizes.device)[:, None] * width
    slot_BN = in_run.flatten(1)[:, :n]
    count = (kept_BRT.shape[1] - 1) * width + max(int(kept_per_run[:, -1].max()), 1)

    index = torch.arange(n, device=sizes.device).expand(batch, -1)
    positions = torch.full((batch, count + 1), -1, device=sizes.device)  # the last column takes what is not kept
    positions = positions.scatter_(1, torch.where(kept_BN, slot_BN, count), index)[:, :count]
    spare = positions < 0
    # 0 before the first token; a spare slot must not break the order of the segments.
    segment = segment_BN.gather(1, positions.clamp(min=0)).masked_fill(spare, 0).cummax(1).values
    first_query = 0
    if sizes.q_start:
        first_query = int(torch.where(kept_BN & (index >= sizes.q_start), slot_BN, count).min())
    return positions, _Slots(segment, spare, sizes.block if sizes.pattern is None else width, first_query)


def _layout(slots: _Slots, branch: Branch, sizes: Sizes, table: Tensor | None) -> BlockLayout:
    """Attention among the slots of each segment, of the queries from the first on."""
    count, block = slots.segment.shape[1], slots.block
    if table is None:
        rows = range(slots.first_query // block, -(-count // block))
        # Two tokens of a segment stand less than this many slots apart.
        window = LocalWindow(min(-(-branch.segment // branch.rate), count))
        within = window.layout(
            count, block=block, causal=sizes.causal, device=sizes.device, rows=rows, documents=slots.segment
        )
        table, mask = within.kv_indices, within.mask
    else:
        rows = range(sizes.q_start // sizes.block, -(-sizes.num_keys // sizes.block))
        segments = slots.segment if bool((slots.segment != slots.segment[:, :1]).any()) else None
        mask = interval_mask(count, causal=sizes.causal, documents=segments, device=sizes.device)
        mask = mask.queries(rows.start * block, count)
        table = _of_kept(table, slots, rows)
    if bool(slots.spare.any()):
        mask = replace(mask, visible_from=torch.where(slots.spare, ALWAYS, mask.visible_from))
    layout = BlockLayout(table, block, block, mask, no_dense_rows(sizes.device))
    skipped = slots.first_query - rows.start * block if sizes.q_start else 0
    return layout.per_token(skipped, layout.num_queries) if skipped else layout


def _pattern_table(branch: Branch, sizes: Sizes, documents: Tensor | None, segment_BN: Tensor) -> Tensor:
    """Blocks of tokens that the pattern reads and that share a segment with their row: int32 [B|1, H|Hkv|1, NQ, K]."""
    assert sizes.pattern is not None
    n, rows = sizes.num_keys, range(sizes.q_start // sizes.block, -(-sizes.num_keys // sizes.block))
    # The window holds every segment, so it takes nothing away; it spells out the pattern's dense rows.
    pattern = sizes.pattern & LocalWindow(min(branch.segment, n))
    layout = pattern.layout(
        n,
        block=sizes.block,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        causal=sizes.causal,
        device=sizes.device,
        rows=rows,
        documents=documents,
    )
    by_segment = BlockGrid(
        n, sizes.block, sizes.heads, sizes.kv_heads, sizes.causal, sizes.device, rows, documents=segment_BN
    )
    return by_segment.of_shared_documents(layout.kv_indices)


def _of_kept(table: Tensor, slots: _Slots, rows: range) -> Tensor:
    """The table without rows and key blocks whose slots are all spare."""
    missing = -slots.spare.shape[1] % slots.block
    kept_BJ = ~torch.nn.functional.pad(slots.spare, (0, missing), value=True).unflatten(1, (-1, slots.block)).all(-1)
    if bool(kept_BJ.all()):
        return table
    batch = max(len(table), len(kept_BJ))
    table, kept_BJ = table.expand(batch, -1, -1, -1), kept_BJ.expand(batch, -1)
    ids = table.clamp(min=0).long()
    key_kept = kept_BJ[:, None, None, :].expand(*ids.shape[:3], -1).gather(3, ids)
    return compact(table, (table >= 0) & key_kept & kept_BJ[:, None, rows.start : rows.stop, None])


def _of_heads(table: Tensor, kv_heads: Sequence[int], sizes: Sizes) -> Tensor:
    """The part of a table [B|1, H|Hkv|1, NQ, K] that belongs to some key/value heads."""
    if table.shape[1] == 1:
        return table
    return table.unflatten(1, (sizes.kv_heads, -1))[:, list(kv_heads)].flatten(1, 2)


def dense_area(sizes: Sizes, documents: Tensor | None) -> Tensor:
    """Query–key area of dense attention over the same tokens in the same tiles: fp64 [B|1]."""
    mask = interval_mask(
        sizes.num_keys, q_start=sizes.q_start, causal=sizes.causal, documents=documents, device=sizes.device
    )
    q_block = 1 if sizes.q_start % sizes.block else sizes.block
    table = torch.empty(1, 1, -(-mask.num_queries // q_block), 0, dtype=torch.int32, device=sizes.device)
    return BlockLayout(table, q_block, sizes.block, mask, no_dense_rows(sizes.device)).areas()[1]
