"""How far back an attention variant reaches: the share of past tokens a query is reached by, by distance and layers.

    lightsparse reach attention=block_sparse data.context=16384 attention.density=0.1

Takes the overrides of train.py. Every layer is taken to use the chosen attention. Time is quadratic in data.context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from lightsparse.cli.words import command
from lightsparse.config.compose import composed
from lightsparse.config.targets import ConfigError

if TYPE_CHECKING:
    from lightsparse.analysis.coverage import Coverage


@command
def main(words: list[str]) -> Iterator[RenderableType]:
    raw = composed(words)
    from lightsparse.analysis.coverage import coverage
    from lightsparse.config.parse import on_this_machine, parse
    from lightsparse.training.preflight.check import layout_of

    config = parse(on_this_machine(raw))
    try:
        layout = layout_of(config)
    except NotImplementedError as error:
        raise ConfigError(
            f"attention is {config.attention.name}, whose blocks depend on the input; compare it with dense attention "
            "by lightsparse.analysis.attention_mass on a trained model's q and k"
        ) from error
    yield (
        f"{config.attention.name}, density {layout.density():.4g}, {layout.num_tokens} tokens: "
        "share of past tokens that reach a query"
    )
    yield _table(coverage(layout, sorted({1, 2, config.model.depth})))


def _table(found: Sequence[Coverage]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("distance (tokens)")
    for one in found:
        table.add_column(f"{one.layers} layer{'s' if one.layers > 1 else ''}", justify="right")
    for row, (start, stop) in enumerate(found[0].distances):
        span = str(start) if stop == start + 1 else f"{start} … {stop - 1}"
        table.add_row(span, *(f"{one.by_distance[row]:.3f}" for one in found))
    table.add_section()
    table.add_row("all", *(f"{one.mean:.3f}" for one in found))
    return table
