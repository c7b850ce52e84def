"""Draw the pattern of any attention variant: which tiles are computed, per head, with the achieved density.

    python -m lightsparse.show attention=block_sparse data.context=16384 attention.density=0.1 out=pattern.png

Takes the overrides of train.py; `out=` names the PNG (default pattern.png).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from lightsparse.analysis import pattern_picture
from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.config import compose
from lightsparse.patterns import BlockLayout
from lightsparse.schema import Config
from lightsparse.targets import ConfigError

OUT = "out="


def layout_of(config: Config) -> BlockLayout:
    """The layout of one layer over data.context tokens, one document.

    Raises ConfigError for a variant that chooses its blocks from its input.
    """
    widths = config.model.widths
    shape = AttentionShape(
        heads=widths.heads,
        kv_heads=widths.kv_heads,
        head_dim=widths.head_dim,
        embed_dim=widths.embed_dim,
        causal=config.objective == "causal",
    )
    ctx = SequenceContext(positions=torch.arange(config.data.context)[None])
    try:
        return config.attention.build(shape).layout(config.data.context, ctx, torch.device("cpu"))
    except NotImplementedError as error:
        raise ConfigError(
            f"attention is {config.attention.name}, whose blocks depend on the input; train it and look at its plots/"
        ) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture; returns the exit code: 0, or 2 after the one sentence that says what is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(soft_wrap=True)
    if {"-h", "--help"} & set(given):
        console.print(__doc__, markup=False, highlight=False)
        return 0
    out = next((Path(word.removeprefix(OUT)) for word in reversed(given) if word.startswith(OUT)), Path("pattern.png"))
    try:
        config = compose([word for word in given if not word.startswith(OUT)])
        layout = layout_of(config)
        if out.suffix != ".png":
            raise ConfigError(f"out is {out}; the picture is a PNG, name it <something>.png")
        pattern_picture.save(layout, out, config.attention.name)
    except ConfigError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), markup=False, highlight=False)
        return 2
    console.print(f"{out}: {config.attention.name}, density {layout.density():.4g}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
