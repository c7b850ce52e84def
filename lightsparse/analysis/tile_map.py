"""What an attention variant reads, as a map over tiles of the attention matrix: one per distinct head, ready to draw.

Of a BlockLayout a tile is read or not. LongNet's dilated attention has no layout over the original tokens; there a
tile counts by the share of its token pairs that some branch reads. A variant that chooses from its input shows what it
chose for one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.analysis.rows import chunks, read_by
from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.attention.dilated import DilatedAttention
from lightsparse.patterns import BlockLayout, interval_mask
from lightsparse.patterns.layout import no_dense_rows
from lightsparse.patterns.mask import document_starts

MAX_PIXELS = 512  # tiles per side that are drawn one by one; larger maps are averaged
MAX_PANELS = 8  # distinct heads


@dataclass(frozen=True)
class HeadMap:
    heads: Sequence[int]  # all that read the same
    read: Tensor  # float [rows, columns] in [0, 1]: share of the pixel that is read
    density: float | None  # of these heads; None where the variant reports its mean only


@dataclass(frozen=True)
class TileMap:
    """Of one sample. A pixel is a tile, or several where MAX_PIXELS tiles do not suffice."""

    panels: Sequence[HeadMap]  # of the first distinct heads
    distinct: int  # distinct heads, drawn or not
    dense: Tensor  # float [rows, columns] in [0, 1]: share of the pixel that dense attention computes
    density: float  # mean over heads
    pixel: tuple[int, int]  # queries and keys to a pixel's side
    block: int  # tokens to a tile's side
    first_query: int
    num_queries: int
    num_tokens: int
    num_keys: int  # tokens, and summaries behind them


@runtime_checkable
class Chooser(Protocol):
    """A core that chooses from its input."""

    def select(self, q: Tensor, k: Tensor, x: Tensor, ctx: SequenceContext) -> Any:
        """What forward would read; `.layout` is its BlockLayout."""


def of_core(
    core: AttentionCore,
    num_tokens: int,
    ctx: SequenceContext,
    given: tuple[Tensor, Tensor, Tensor] | None = None,
    limit: int = MAX_PANELS,
) -> TileMap:
    """What `core` reads in the first sample of a pass over num_tokens tokens, without a cache.

    given  q [B, H, N, D], k [B, Hkv, N, D], x [B, N, E] for cores that choose from them; None: `random_input`
    Raises NotImplementedError for a core with neither a layout nor a choice to show.
    """
    if isinstance(core, DilatedAttention):
        return of_dilated(core, num_tokens, ctx, limit)
    if not isinstance(core, Chooser):
        return of_layout(core.layout(num_tokens, ctx, torch.device("cpu")), limit)
    with torch.no_grad():
        return of_layout(core.select(*(given or random_input(core.shape, num_tokens)), ctx).layout, limit)


def random_input(shape: AttentionShape, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, N, D], k [1, Hkv, N, D] and x [1, N, E] that vary slowly along the sequence, entries about N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def smooth(heads: int, width: int) -> Tensor:
        knots = torch.randn(heads, width, max(num_tokens // 256, 2), generator=generator)
        return F.rms_norm(F.interpolate(knots, size=num_tokens, mode="linear").mT, (width,))[None]

    return smooth(shape.heads, shape.head_dim), smooth(shape.kv_heads, shape.head_dim), smooth(1, shape.embed_dim)[0]


def of_layout(layout: BlockLayout, limit: int = MAX_PANELS) -> TileMap:
    """The tiles that a layout names. Memory is quadratic in blocks for one head at a time."""
    layout = first_sample(layout)
    groups = distinct_heads(layout)
    panels = [HeadMap(heads, shrink(one.block_map()[0, 0]), one.density()) for heads, one in groups[:limit]]
    return TileMap(
        panels,
        len(groups),
        shrink(dense_map(layout)),
        layout.density(),
        (
            tiles_per_pixel(layout.num_q_blocks) * layout.q_block,
            tiles_per_pixel(layout.num_kv_blocks) * layout.kv_block,
        ),
        layout.kv_block,
        int(layout.mask.q_pos[0, 0]),
        layout.num_queries,
        layout.num_tokens,
        layout.num_keys,
    )


def first_sample(layout: BlockLayout) -> BlockLayout:
    mask = layout.mask
    tensors = {f.name: getattr(mask, f.name) for f in fields(mask) if isinstance(getattr(mask, f.name), Tensor)}
    mask = replace(mask, **{name: tensor[:1].cpu() for name, tensor in tensors.items()})
    return replace(layout, kv_indices=layout.kv_indices[:1].cpu(), mask=mask, dense_rows=layout.dense_rows.cpu())


def distinct_heads(layout: BlockLayout) -> list[tuple[list[int], BlockLayout]]:
    """Heads of the table that read the same blocks, together: (their numbers, layout of one of them), in order."""
    groups: list[tuple[list[int], BlockLayout]] = []
    for head in range(layout.kv_indices.shape[1]):
        table = layout.kv_indices[:, head : head + 1]
        same = next((heads for heads, one in groups if torch.equal(one.kv_indices, table)), None)
        if same is None:
            groups.append(([head], replace(layout, kv_indices=table)))
        else:
            same.append(head)
    return groups


def dense_map(layout: BlockLayout) -> Tensor:
    """Bool [NQ, NKVB]: tiles that dense attention over the same documents computes, in the first sample."""
    mask = layout.mask
    last_query = _last_of_blocks(mask.q_pos[0], layout.q_block)
    first_key = torch.arange(0, layout.num_tokens, layout.kv_block)
    tiles = torch.ones(len(last_query), len(first_key), dtype=torch.bool)
    if mask.causal:
        tiles &= first_key <= last_query[:, None]
    if mask.q_doc is not None and mask.kv_doc is not None:
        q_doc, kv_doc = mask.q_doc[0], mask.kv_doc[0, : layout.num_tokens]
        tiles &= kv_doc[:: layout.kv_block] <= _last_of_blocks(q_doc, layout.q_block)[:, None]
        tiles &= _last_of_blocks(kv_doc, layout.kv_block) >= q_doc[:: layout.q_block, None]
    return F.pad(tiles, (0, layout.num_kv_blocks - tiles.shape[1]))  # none of the appended keys


def of_dilated(core: DilatedAttention, num_tokens: int, ctx: SequenceContext, limit: int = MAX_PANELS) -> TileMap:
    """Tiles of the original matrix, by the share of the pairs dense attention has there that some branch reads.

    The density is the one that the core reports, of the tiles it computes among gathered tokens; pairs that several
    branches read count several times there, once here. Time O(N · longest segment) per distinct head.
    """
    documents = None if ctx.documents is None else ctx.documents[:1].cpu()
    index, block = torch.arange(num_tokens), core.config.block
    start_N = torch.zeros_like(index) if documents is None else document_starts(documents)[0]
    mask = interval_mask(num_tokens, causal=core.shape.causal, documents=documents)
    table = torch.empty(1, 1, -(-num_tokens // block), 0, dtype=torch.int32)
    dense = shrink(dense_map(BlockLayout(table, block, block, mask, no_dense_rows(torch.device("cpu")))))
    within = _layout_of_pattern(core, num_tokens, documents)
    pixel = tiles_per_pixel(-(-num_tokens // block)) * block

    groups = _distinct_dilated_heads(core, within)
    read = torch.zeros(len(groups[:limit]), *dense.shape)
    possible = torch.zeros_like(dense)
    longest, causal = max(branch.segment for branch in core.branches), core.shape.causal
    stop_N = index + 1 if causal else start_N + start_N.bincount()[start_N]  # behind the last key a query may see
    for queries in (some for run in index.split(pixel) for some in chunks(run, min(2 * longest, num_tokens))):
        # No key farther off than the longest segment is read; whole pixels, so that their shares are right.
        first = max(int(queries[0]) - longest, 0) // pixel
        last = min(int(queries[-1]) + (0 if causal else longest), num_tokens - 1) // pixel
        row, borders = int(queries[0]) // pixel, torch.arange(first, last + 2) * pixel
        seen = stop_N[queries, None].minimum(borders[1:]) - start_N[queries, None].maximum(borders[:-1])
        possible[row, first : last + 1] += seen.clamp(min=0).sum(0)
        keys = index[first * pixel : (last + 1) * pixel]
        for each, heads in zip(read, groups, strict=False):
            pairs = dilated_pairs(core, heads[0], queries, keys, start_N, within)
            each[row, first : last + 1] += _per_pixel(pairs, pixel)
    panels = [
        HeadMap(heads, each / possible.clamp(min=1) * dense, None) for each, heads in zip(read, groups, strict=False)
    ]

    zeros = (torch.zeros(1, heads, num_tokens, 2) for heads in (core.shape.heads, *[core.shape.kv_heads] * 2))
    alone = replace(ctx, positions=ctx.positions[:1].cpu(), documents=documents, layouts={})
    with torch.no_grad():
        density = float(core(*zeros, ctx=alone).stats["density"])
    return TileMap(panels, len(groups), dense, density, (pixel, pixel), block, 0, num_tokens, num_tokens, num_tokens)


def dilated_pairs(
    core: DilatedAttention, head: int, queries: Tensor, keys: Tensor, start_N: Tensor, within: BlockLayout | None
) -> Tensor:
    """Bool [R, K]: pairs that query head `head` reads through some branch.

    queries, keys  int64 [R], [K]: indices of neighbouring tokens
    start_N        int64 [N]: index of the first token of each token's document
    within         layout of the core's own pattern, or None
    """
    kv_head = head * core.shape.kv_heads // core.shape.heads
    pairs = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for branch in core.branches:
        if kv_head not in branch.kv_heads:
            continue
        reach = 0 if core.shape.causal else branch.segment
        near = keys[(keys > queries[0] - branch.segment) & (keys <= queries[-1] + reach)]
        q_place, k_place = ((some - start_N[some]) % branch.segment for some in (queries, near))
        q_kept, k_kept = (place % branch.rate == kv_head % branch.rate for place in (q_place, k_place))
        q, k = queries[q_kept], near[k_kept]
        together = (q - q_place[q_kept])[:, None] == k - k_place[k_kept]  # their segments begin at the same token
        if core.shape.causal:
            together &= k <= q[:, None]
        pairs[(q - queries[0])[:, None], k - keys[0]] |= together
    if within is not None:
        rows = read_by(within, queries)[0]
        pairs &= rows[head * len(rows) // core.shape.heads][:, keys]
    return pairs


def _layout_of_pattern(core: DilatedAttention, num_tokens: int, documents: Tensor | None) -> BlockLayout | None:
    if core.config.pattern is None:
        return None
    return core.config.pattern.layout(
        num_tokens,
        block=core.config.block,
        heads=core.shape.heads,
        kv_heads=core.shape.kv_heads,
        causal=core.shape.causal,
        documents=documents,
    )


def _distinct_dilated_heads(core: DilatedAttention, within: BlockLayout | None) -> list[list[int]]:
    """Query heads with the same residue in every branch they take, and the same pattern."""
    shape, alike = core.shape, dict[int, int]()
    for number, (rows, _) in enumerate([] if within is None else distinct_heads(within)):
        alike |= dict.fromkeys(rows, number)
    groups: dict[Any, list[int]] = {}
    for head in range(shape.heads):
        kv_head = head * shape.kv_heads // shape.heads
        residues = tuple(kv_head % branch.rate if kv_head in branch.kv_heads else None for branch in core.branches)
        groups.setdefault((residues, alike.get(head * max(len(alike), 1) // shape.heads)), []).append(head)
    return list(groups.values())


def _per_pixel(pairs: Tensor, pixel: int) -> Tensor:
    """Bool [R, K] → float [⌈K / pixel⌉]: how many are True in each run of columns."""
    counts = pairs.sum(0, dtype=torch.float32)
    return F.pad(counts, (0, -len(counts) % pixel)).unflatten(0, (-1, pixel)).sum(1)


def _last_of_blocks(values: Tensor, block: int) -> Tensor:
    ends = torch.arange(block - 1, len(values) + block - 1, block).clamp(max=len(values) - 1)
    return values[ends]


def tiles_per_pixel(tiles: int) -> int:
    return -(-tiles // MAX_PIXELS)


def shrink(tiles: Tensor) -> Tensor:
    """Bool [rows, columns] → float shares, at most MAX_PIXELS on a side."""
    factors = tuple(tiles_per_pixel(size) for size in tiles.shape)
    return F.avg_pool2d(tiles.float()[None, None], factors, ceil_mode=True)[0, 0]
