"""Hierarchies: near tokens in full, farther ones more and more sparsely, in two forms.

`Hierarchical` selects: a level reads every stride-th block of its window, and the union of the levels is read.
`PooledHierarchy` summarises: a level reads one mean key per `stride` tokens, and every past token is covered exactly
once, by itself or by one summary. The schemes are ours; fine near and coarse far is a known idea (H-Transformer-1D, Zhu
& Soricut 2021, arXiv 2107.11906), and so are near and distant blocks under one softmax (BigBird, Zaheer et al. 2020,
arXiv 2007.14062).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from lightsparse.patterns.grid import BlockGrid, compact
from lightsparse.patterns.layout import BlockLayout, no_dense_rows
from lightsparse.patterns.mask import ALWAYS, interval_mask
from lightsparse.patterns.pattern import Pattern, side_by_side

Levels = tuple[tuple[int | None, int], ...]  # (window in tokens, None = the whole past; stride), finest first


@dataclass(frozen=True)
class Hierarchical(Pattern):
    """For some (window, stride): J is within the window as in LocalWindow and J ≡ stride − 1 (mod stride), in blocks.

    The own block always. A window of None reaches over everything.
    """

    levels: Levels  # (tokens or None, blocks)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", as_levels(self.levels, "Hierarchical.levels"))

    def rows(self, grid: BlockGrid) -> Tensor:
        own = grid.row_ids[None, None, :, None]
        tables = []
        for window, stride in self.levels:
            reach = grid.num_kv if window is None else min(-(-(window - 1) // grid.block), grid.num_kv)
            farthest = reach if grid.causal else 2 * reach
            first = (own - reach).clamp(min=0)
            last = own if grid.causal else (own + reach).clamp(max=grid.num_kv - 1)
            first = first + (stride - 1 - first) % stride
            columns = first + stride * torch.arange(farthest // stride + 1, dtype=torch.int32, device=grid.device)
            tables.append(torch.where(columns <= last, columns, -1))
        return grid.visible(torch.cat(tables, dim=-1), also_own=True)


@dataclass(frozen=True)
class Segment:
    """The keys of one level, a run of whole blocks: the tokens, or the summaries of `stride` tokens each."""

    stride: int  # tokens per key
    delay: int  # key g is visible from (g + 1) · stride + delay: the finer level's window, or −1 for the tokens
    count: int  # keys, without the padding to whole blocks
    first_block: int  # id of its first block


@dataclass(frozen=True)
class PooledHierarchy(Pattern):
    """Tokens of a near window, then mean summaries of ever more tokens: each query covers each past token once.

    Level l has a window w_l and one key per s_l tokens (s_0 = 1). Its group g of tokens [g·s_l, (g+1)·s_l) is visible
    from (g+1)·s_l + w_{l−1}, exactly where the finer keys inside it end; the coarsest level stays for ever. So the
    spans of one token, its summary, that summary's summary, … partition the future of the token, and a query reads at
    least the w_0 tokens before it one by one. A window smaller than a finer level's counts as equal to it.

    Keys of the layout: the tokens, then one segment of summaries per level that some query of the sequence reads, each
    segment padded to whole blocks. Ids of token blocks don't depend on the length; those of summaries follow them.

    Documents: positions count in the packed sequence. A group that a document's border cuts has no summary; what it
    would stand for stays visible at the finer level to the end of the document. Causal only. A query block reads
    O((w_0 + s_1)/block + Σ (w_l + s_{l+1})/(s_l·block) + N/(s_L·block)) blocks.
    """

    window: int  # w_0, tokens
    coarser: Levels  # (w_l, s_l): tokens or None for the last, tokens per summary

    def __post_init__(self) -> None:
        levels = as_levels(((self.window, 1), *self.coarser), "PooledHierarchy, its window first,")
        check_nested(levels, "PooledHierarchy, its window first,")
        object.__setattr__(self, "coarser", levels[1:])

    def rows(self, grid: BlockGrid) -> Tensor:
        raise ValueError(
            "PooledHierarchy adds keys to the sequence, so it is a whole layout and no part of a union, intersection "
            "or mixture; use Hierarchical there"
        )

    def segments(self, num_tokens: int, block: int) -> tuple[Segment, ...]:
        """The tokens, then the levels of which some query among `num_tokens` tokens reads a summary, finest first."""
        found = [Segment(1, -1, num_tokens, 0)]
        delay = self.window
        for window, stride in self.coarser:
            count = (num_tokens - 1 - delay) // stride  # the last summary opens at count · stride + delay
            if count < 1:
                break
            finer = found[-1]
            found.append(Segment(stride, delay, count, finer.first_block + -(-finer.count // block)))
            delay = max(delay, window or 0)
        return tuple(found)

    def layout(
        self,
        seq_len: int,
        *,
        block: int = 64,
        heads: int = 1,
        kv_heads: int | None = None,
        causal: bool = True,
        device: torch.device | str = "cpu",
        rows: range | None = None,
        documents: Tensor | None = None,
    ) -> BlockLayout:
        """As Pattern.layout; the keys are the tokens and the summaries (`segments`), block ids count through both."""
        if not causal:
            raise ValueError("PooledHierarchy is causal only; use Hierarchical or objective=causal")
        device = torch.device(device)
        wanted = range(-(-seq_len // block) if block > 0 else 0) if rows is None else rows
        documents = None if documents is None else documents.to(device)
        kv_heads = heads if kv_heads is None else kv_heads
        grid = BlockGrid(seq_len, block, heads, kv_heads, True, device, wanted, documents)
        if grid.documents is not None and bool((grid.documents == grid.documents[:, :1]).all()):
            grid = replace(grid, documents=None)  # one document: nothing to isolate
        segments = self.segments(seq_len, block)
        table = _table(segments, grid)
        mask = interval_mask(seq_len, documents=grid.documents, device=device)
        if len(segments) > 1:
            visible_from, visible_until = _intervals(segments, grid)
            kv_doc = mask.kv_doc
            if kv_doc is not None:
                kv_doc = _padded([kv_doc[:, :: level.stride][:, : level.count] for level in segments], block, 0)
            mask = replace(
                mask,
                visible_from=_padded(visible_from, block, ALWAYS),  # a padded key is never read
                visible_until=_padded(visible_until, block, ALWAYS),
                kv_doc=kv_doc,
                num_tokens=seq_len,
            )
        if rows is not None:
            mask = mask.queries(rows.start * block, min(rows.stop * block, seq_len))
        return BlockLayout(table, block, block, mask, no_dense_rows(device))


def as_levels(levels: Levels, name: str) -> Levels:
    """The levels as tuples. Raises ValueError where there are none, or a window or stride is below 1."""
    levels = tuple((window, stride) for window, stride in levels)
    if not levels:
        raise ValueError(f"{name} is empty; give at least one level [window, stride]")
    for window, stride in levels:
        if stride < 1 or (window is not None and window < 1):
            raise ValueError(
                f"{name} is {levels}; a window counts tokens (None = the whole past) and a stride keys, both at least 1"
            )
    return levels


def check_nested(levels: Levels, name: str) -> None:
    """Raises ValueError unless every group consists of groups of the finer level and only the last level has no end."""
    *finer, (last_window, _) = levels
    if len(levels) < 2 or levels[0][1] != 1:
        raise ValueError(
            f"{name} is {levels}; it needs a level of stride 1 (the tokens) and one of summaries behind it"
        )
    if last_window is not None or any(window is None for window, _ in finer):
        raise ValueError(
            f"{name} is {levels}; the last level reaches over the whole past, window null, and only that one"
        )
    for (_, fine), (_, coarse) in pairwise(levels):
        if coarse <= fine or coarse % fine:
            raise ValueError(
                f"{name} is {levels}; each stride must be a larger multiple of the finer one, not {coarse} after {fine}"
            )


def _intervals(segments: tuple[Segment, ...], grid: BlockGrid) -> tuple[list[Tensor], list[Tensor]]:
    """Positions from and until which the keys of each segment are visible: two lists of int32 [B|1, count]."""
    opens = []
    for level in segments:
        end = torch.arange(1, level.count + 1, device=grid.device) * level.stride
        opening = (end + level.delay)[None]
        if grid.documents is not None:  # a group that a border cuts has no summary
            whole = grid.documents[:, end - level.stride] == grid.documents[:, end - 1]
            opening = torch.where(whole, opening, ALWAYS)
        opens.append(opening)
    closes = []
    for level, coarser, opening in zip(segments, segments[1:], opens[1:], strict=False):
        group = torch.arange(level.count, device=grid.device) * level.stride // coarser.stride
        until = opening[:, group.clamp(max=coarser.count - 1)]
        closes.append(torch.where(group < coarser.count, until, ALWAYS))
    closes.append(torch.full_like(opens[-1], ALWAYS))
    return [x.to(torch.int32) for x in opens], [x.to(torch.int32) for x in closes]


def _table(segments: tuple[Segment, ...], grid: BlockGrid) -> Tensor:
    """Blocks of all segments that hold a key some query of the row reads: int32 [B|1, 1, NQ, K]."""
    first_query = grid.row_ids.long()[None] * grid.block
    last_query = (first_query + grid.block - 1).clamp(max=grid.seq_len - 1)
    # Only the document of the row's first query reaches back to keys that a cut group left behind. Documents that
    # start within the row read nothing that the row would not read without documents.
    start = grid.document_spans()[0][:, first_query[0]].long()
    tables = []
    for level, coarser in zip_longest(segments, segments[1:]):
        last = _floor_div(last_query - level.delay, level.stride) - 1
        own_first = _ceil_div(start, level.stride)  # the document's first key of this level
        first = own_first
        if coarser is not None:
            of_group = coarser.stride // level.stride
            not_handed_over = _floor_div(first_query - coarser.delay, coarser.stride) * of_group
            first = torch.maximum(own_first, not_handed_over)
            if grid.documents is not None:
                left_behind = torch.minimum(_ceil_div(start, coarser.stride) * of_group - 1, last)
                tables.append(_blocks(own_first, left_behind, level, grid.block))
        tables.append(_blocks(first, last, level, grid.block))
    table = side_by_side(tables)
    return compact(table, table >= 0)


def _blocks(first: Tensor, last: Tensor, level: Segment, block: int) -> Tensor:
    """Ids of the blocks with keys first … last of a level, [B|1, NQ] each: int32 [B|1, 1, NQ, K], −1 = none."""
    first, last = torch.broadcast_tensors(first, last)
    begin, end = _floor_div(first, block), _floor_div(last, block)
    width = max(int((end - begin).max()) + 1, 1) if begin.numel() else 1
    ids = begin[..., None] + torch.arange(width, device=first.device)
    inside = (ids <= end[..., None]) & (first <= last)[..., None]
    return torch.where(inside, ids + level.first_block, -1).to(torch.int32)[:, None]


def _padded(parts: list[Tensor], block: int, value: int) -> Tensor:
    """Segments [B|1, count] side by side, each padded to whole blocks."""
    batch = max(len(x) for x in parts)
    padded = [torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=value) for x in parts]
    return torch.cat([x.expand(batch, -1) for x in padded], dim=1)


def _floor_div(x: Tensor, divisor: int) -> Tensor:
    return x.div(divisor, rounding_mode="floor")


def _ceil_div(x: Tensor, divisor: int) -> Tensor:
    return _floor_div(x + divisor - 1, divisor)
