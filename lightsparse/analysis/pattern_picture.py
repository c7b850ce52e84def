"""Pictures of what attention reads: which tiles of its matrix are computed, one panel per distinct head or variant.

Dark: the tile is computed; in between: a part of it. Pale: dense attention would compute it, this pattern does not.
White: nobody reads there (the future, another document).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from lightsparse.analysis.tile_map import HeadMap, TileMap, of_layout
from lightsparse.patterns import BlockLayout

_Colour = tuple[float, float, float]
_COMPUTED = (0.16, 0.20, 0.47)
_SKIPPED = (0.89, 0.90, 0.95)
_PARTLY = (0.525, 0.55, 0.71)  # halfway
_FRAME = "#b8bac6"
_QUIET = "#5b5e70"  # text beside the names


def save(pattern: TileMap | BlockLayout, path: Path, title: str) -> Path:
    """Draw the first sample's pattern to `path` (PNG by its suffix) and return the path.

    The title's second line gives the achieved density, sequence length and block.
    """
    drawn = of_layout(pattern) if isinstance(pattern, BlockLayout) else pattern
    panels = drawn.panels
    columns = 1 if len(panels) == 1 else 2  # readable on a phone: never more than two side by side
    rows = -(-len(panels) // columns)
    spacing = ConstrainedLayoutEngine(h_pad=0.08)
    figure = Figure(figsize=(5.4, 6.2) if columns == 1 else (7.2, 3.5 * rows + 1.3), dpi=200, layout=spacing)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, drawn, panel)
        _label_tokens(axes, drawn)
        if drawn.distinct > 1:
            axes.set_title(_name(panel), fontsize=11)
        if index % columns == 0:
            axes.set_ylabel("query token", fontsize=11)
        if index + columns >= len(panels):
            appended = drawn.num_keys > drawn.num_tokens
            axes.set_xlabel("key token, then summaries" if appended else "key token", fontsize=11)
    keys = [Patch(color=colour, label=label) for colour, label in _legend([drawn])]
    size = 11 if len(keys) < 3 else 9  # three must fit into the width of one panel
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=size)
    subtitle = f"density {drawn.density:.3g} · {drawn.num_tokens:,} tokens · block {drawn.block}"
    if drawn.distinct > len(panels):
        subtitle += f" · {len(panels)} of {drawn.distinct} distinct heads"
    figure.suptitle(f"{title}\n{subtitle}", fontsize=13)
    return _written(figure, path)


def save_gallery(variants: Mapping[str, tuple[TileMap, str]], path: Path) -> Path:
    """Draw the first head of several variants side by side to `path` (PNG by its suffix) and return the path.

    variants  name → (its map, a remark or ""); a remark stands in the legend, an asterisk behind the names that have it
    The last place of the grid is the legend. Type is large: the whole is readable when shrunk to a phone's width.
    """
    places = len(variants) + 1
    # The fewest empty places; of many variants more stand side by side, so that a screen holds them all.
    columns = min((4, 3) if places < 12 else (5, 4), key=lambda columns: -places % columns)
    rows = -(-places // columns)
    spacing = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08, wspace=0.02, hspace=0.03)
    figure = Figure(figsize=(2.0 * columns, 2.6 * rows), dpi=200, layout=spacing)
    for index, (name, (drawn, remark)) in enumerate(variants.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, drawn, drawn.panels[0])
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{name} *" if remark else name, fontsize=15, fontweight="bold", pad=6)
        axes.set_xlabel(f"density {drawn.density:.2g}", fontsize=13.5, color=_QUIET, labelpad=5)
        if drawn.num_keys > drawn.num_tokens:
            _note(axes, "summaries →", right=drawn.num_tokens / drawn.num_keys - 0.03)
    maps, remarks = zip(*variants.values(), strict=True)
    _draw_legend(figure.add_subplot(rows, columns, places), maps, sorted(set(filter(None, remarks))))
    return _written(figure, path)


def image(drawn: TileMap, panel: HeadMap) -> Tensor:
    """The colours of a panel's pixels: float [rows, columns, 3]."""
    read, dense = panel.read[..., None], drawn.dense[..., None]
    skipped = (dense - read).clamp(min=0)
    read = read.sqrt()  # a lone tile among many averaged ones stays visible
    skipped = skipped.minimum(1 - read)
    nothing = 1 - read - skipped
    return read * torch.tensor(_COMPUTED) + skipped * torch.tensor(_SKIPPED) + nothing


def _draw(axes: Axes, drawn: TileMap, panel: HeadMap) -> None:
    start, queries, keys = drawn.first_query, drawn.num_queries, drawn.num_keys
    picture = image(drawn, panel)
    # The last tile may reach past the last token; the limits cut it there.
    down, right = picture.shape[0] * drawn.pixel[0], picture.shape[1] * drawn.pixel[1]
    axes.imshow(picture.numpy(), extent=(0, right, start + down, start), aspect="auto")
    axes.set(xlim=(0, keys), ylim=(start + queries, start), box_aspect=1)
    if keys > drawn.num_tokens:
        axes.axvline(drawn.num_tokens, color=_FRAME, linewidth=0.8)
    axes.tick_params(labelsize=10, length=3, color=_FRAME)
    for spine in axes.spines.values():
        spine.set_color(_FRAME)


def _label_tokens(axes: Axes, drawn: TileMap) -> None:
    for axis, begin, length in ((axes.xaxis, 0, drawn.num_tokens), (axes.yaxis, drawn.first_query, drawn.num_queries)):
        ticks = [begin + length * quarter // 4 for quarter in range(5)]
        axis.set_ticks(ticks, [_tokens(tick) for tick in ticks])


def _note(axes: Axes, text: str, right: float) -> None:
    """In the upper right corner, where a causal pattern leaves room."""
    axes.text(right, 0.96, text, transform=axes.transAxes, fontsize=12, color=_QUIET, ha="right", va="top")


def _legend(maps: Sequence[TileMap]) -> list[tuple[_Colour, str]]:
    """Colours and what they mean; "partly computed" only where it occurs."""
    entries: list[tuple[_Colour, str]] = [(_COMPUTED, "computed"), (_SKIPPED, "only in dense")]
    if any(bool(((panel.read > 0) & (panel.read < one.dense)).any()) for one in maps for panel in one.panels):
        entries.insert(1, (_PARTLY, "partly computed"))
    return entries


def _draw_legend(axes: Axes, maps: Sequence[TileMap], remarks: Sequence[str]) -> None:
    axes.set(xlim=(0, 1), ylim=(1, 0), box_aspect=1)
    axes.axis("off")
    for row, (colour, label) in enumerate(_legend(maps)):
        top = 0.01 + 0.16 * row
        axes.add_patch(Rectangle((0, top), 0.1, 0.1, facecolor=colour, edgecolor=_FRAME, linewidth=0.6))
        axes.text(0.16, top + 0.05, label, fontsize=12, va="center")
    said = [f"↓ query  → key\n{maps[0].num_tokens:,} tokens\nfirst head"]
    said += ["* " + remark.replace(", ", ",\n  ") for remark in remarks]
    axes.text(0, 0.98, "\n".join(said), fontsize=12, color=_QUIET, va="bottom", linespacing=1.2)


def _written(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _name(panel: HeadMap) -> str:
    heads = panel.heads
    shown = ", ".join(str(head) for head in heads[:6]) + (", …" if len(heads) > 6 else "")
    density = "" if panel.density is None else f" · {panel.density:.3g}"
    return f"head{'s' if len(heads) > 1 else ''} {shown}{density}"


def _tokens(count: int) -> str:
    """16384 → 16k, 1000 → 1000: binary thousands where they are short."""
    return f"{count / 1024:g}k" if count >= 1024 and count % 256 == 0 else str(count)
