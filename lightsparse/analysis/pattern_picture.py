"""Pictures of a BlockLayout: which tiles of the attention matrix are computed, a panel per distinct head.

Dark: the tile is computed. Pale: dense attention would compute it, this pattern does not. White: nobody reads there
(the future, another document).
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from lightsparse.patterns import BlockLayout

MAX_PANELS = 8
MAX_PIXELS = 512  # tiles per side that are drawn one by one; larger maps are averaged

_COMPUTED = (0.16, 0.20, 0.47)
_SKIPPED = (0.89, 0.90, 0.95)
_FRAME = "#b8bac6"


def save(layout: BlockLayout, path: Path, title: str) -> Path:
    """Draw the first sample's pattern to `path` (PNG by its suffix) and return the path.

    The title's second line gives the achieved density, sequence length and block; at most MAX_PANELS distinct heads are
    drawn. Memory is quadratic in blocks for one head at a time.
    """
    layout = first_sample(layout)
    groups = distinct_heads(layout)
    shown = groups[:MAX_PANELS]
    columns = 1 if len(shown) == 1 else 2  # readable on a phone: never more than two side by side
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.4, 6.2) if columns == 1 else (7.2, 3.5 * rows + 1.3), dpi=200, layout="constrained")
    for index, (heads, of_head) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, of_head)
        if len(groups) > 1:
            axes.set_title(_name(heads, of_head.density()), fontsize=11)
        if index % columns == 0:
            axes.set_ylabel("query token", fontsize=11)
        if index + columns >= len(shown):
            appended = layout.num_keys > layout.num_tokens
            axes.set_xlabel("key token, then summaries" if appended else "key token", fontsize=11)
    keys = [Patch(color=_COMPUTED, label="computed"), Patch(color=_SKIPPED, label="dense attention only")]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    subtitle = f"density {layout.density():.3g} · {layout.num_tokens:,} tokens · block {layout.kv_block}"
    if len(groups) > len(shown):
        subtitle += f" · {len(shown)} of {len(groups)} distinct heads"
    figure.suptitle(f"{title}\n{subtitle}", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


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


def image(layout: BlockLayout) -> Tensor:
    """Colours of a one-head layout's tiles: float [rows, columns, 3], at most MAX_PIXELS on a side."""
    read = _shrink(layout.block_map()[0, 0])[..., None]
    dense = _shrink(dense_map(layout))[..., None]
    skipped = (dense - read).clamp(min=0)
    read = read.sqrt()  # a lone tile among many averaged ones stays visible
    skipped = skipped.minimum(1 - read)
    nothing = 1 - read - skipped
    return read * torch.tensor(_COMPUTED) + skipped * torch.tensor(_SKIPPED) + nothing


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
    return torch.nn.functional.pad(tiles, (0, layout.num_kv_blocks - tiles.shape[1]))  # none of the appended keys


def _draw(axes: Axes, layout: BlockLayout) -> None:
    start, queries, keys = int(layout.mask.q_pos[0, 0]), layout.num_queries, layout.num_keys
    picture = image(layout)
    # The last tile may reach past the last token; the limits cut it there.
    down = picture.shape[0] * _tiles_per_pixel(layout.num_q_blocks) * layout.q_block
    right = picture.shape[1] * _tiles_per_pixel(layout.num_kv_blocks) * layout.kv_block
    axes.imshow(picture.numpy(), extent=(0, right, start + down, start), aspect="auto")
    axes.set(xlim=(0, keys), ylim=(start + queries, start), box_aspect=1)
    if keys > layout.num_tokens:
        axes.axvline(layout.num_tokens, color=_FRAME, linewidth=0.8)
    for axis, begin, length in ((axes.xaxis, 0, layout.num_tokens), (axes.yaxis, start, queries)):
        ticks = [begin + length * quarter // 4 for quarter in range(5)]
        axis.set_ticks(ticks, [_tokens(tick) for tick in ticks])
    axes.tick_params(labelsize=10, length=3, color=_FRAME)
    for spine in axes.spines.values():
        spine.set_color(_FRAME)


def _name(heads: list[int], density: float) -> str:
    shown = ", ".join(str(head) for head in heads[:6]) + (", …" if len(heads) > 6 else "")
    return f"head{'s' if len(heads) > 1 else ''} {shown} · {density:.3g}"


def _tokens(count: int) -> str:
    """16384 → 16k, 1000 → 1000: binary thousands where they are short."""
    return f"{count / 1024:g}k" if count >= 1024 and count % 256 == 0 else str(count)


def _last_of_blocks(values: Tensor, block: int) -> Tensor:
    ends = torch.arange(block - 1, len(values) + block - 1, block).clamp(max=len(values) - 1)
    return values[ends]


def _tiles_per_pixel(tiles: int) -> int:
    return -(-tiles // MAX_PIXELS)


def _shrink(tiles: Tensor) -> Tensor:
    """Bool [rows, columns] → float shares, at most MAX_PIXELS on a side."""
    factors = tuple(_tiles_per_pixel(size) for size in tiles.shape)
    return torch.nn.functional.avg_pool2d(tiles.float()[None, None], factors, ceil_mode=True)[0, 0]
