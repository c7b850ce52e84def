"""How far back an attention variant reaches: the share of past tokens a query is reached by, by distance and layers.

    lightsparse reach attention=block_sparse data.context=16384 attention.density=0.1

Takes the overrides of train.py. Every layer is taken to use the chosen attention. Time is quadratic in data.context.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightsparse.analysis.coverage import Coverage, coverage
from lightsparse.config.parse import compose
from lightsparse.config.targets import ConfigError
from lightsparse.training.preflight.check import layout_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code: 0, or 2 after the one sentence that says what is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    if {"-h", "--help"} & set(given):
        console.print(__doc__, markup=False, highlight=False)
        return 0
    try:
        config = compose(given)
        layout = layout_of(config)
    except NotImplementedError:
        errors.print(
            f"attention is {config.attention.name}, whose blocks depend on the input; compare it with dense attention "
            "by lightsparse.analysis.attention_mass on a trained model's q and k"
        )
        return 2
    except ConfigError as error:
        errors.print(str(error), markup=False, highlight=False)
        return 2
    found = coverage(layout, sorted({1, 2, config.model.depth}))
    console.print(
        f"{config.attention.name}, density {layout.density():.4g}, {layout.num_tokens} tokens: "
        "share of past tokens that reach a query",
        markup=False,
        highlight=False,
    )
    console.print(_table(found))
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
