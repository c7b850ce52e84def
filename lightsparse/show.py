"""Draw the pattern of any attention variant: which tiles are computed, per head, with the achieved density.

    python -m lightsparse.show attention=block_sparse data.context=16384 attention.density=0.1 out=pattern.png

Takes the overrides of train.py; `out=` names the PNG (default pattern.png).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightsparse.analysis import pattern_picture
from lightsparse.config import compose, layout_of
from lightsparse.targets import ConfigError

OUT = "out="


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture; returns the exit code: 0, or 2 after the one sentence that says what is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
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
    except NotImplementedError:
        errors.print(
            f"attention is {config.attention.name}, whose blocks depend on the input; train it and see its plots/"
        )
        return 2
    except ConfigError as error:
        errors.print(str(error), markup=False, highlight=False)
        return 2
    console.print(f"{out}: {config.attention.name}, density {layout.density():.4g}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
