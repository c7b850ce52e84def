"""Draw what an attention variant reads: which tiles of its matrix are computed, per head, with the achieved density.

    lightsparse show attention=block_sparse data.context=16384 attention.density=0.1 out=pattern.png
    lightsparse show attention=all out=variants.png
    lightsparse show run=runs/<name> layer=2

Takes the overrides of train.py, and
  out=FILE.png   the picture (default pattern.png)
  attention=all  the first head of every variant in one picture, at data.context=8192 unless given
  run=FOLDER     a run directory: what its newest checkpoint reads of the first validation sample; no other overrides
  layer=N        of the run's model, counted from 0 (default: the first with the chosen attention)
A variant that chooses from its input is drawn with an untrained router on random input, in training mode at step 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from lightsparse.analysis import pattern_picture
from lightsparse.analysis.tile_map import MAX_PANELS, Chooser, TileMap, of_core
from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.cli.show_run import of_run
from lightsparse.config.compose import conf_dir
from lightsparse.config.parse import compose
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.data import DataError

OWN = ("out", "run", "layer")
UNTRAINED = "untrained, random input"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture; returns the exit code: 0, or 2 after the one sentence that says what is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    if {"-h", "--help"} & set(given):
        console.print(__doc__, markup=False, highlight=False)
        return 0
    try:
        lines = draw(given)
    except (ConfigError, DataError) as error:
        errors.print(str(error), markup=False, highlight=False)
        return 2
    for line in lines:
        console.print(line, markup=False, highlight=False)
    return 0


def draw(words: Sequence[str]) -> list[str]:
    """Write the picture that the command line asks for; returns what to say about it, a line each."""
    own, overrides = _own_words(words)
    out = Path(own.get("out", "pattern.png"))
    if out.suffix != ".png":
        raise ConfigError(f"out is {out}; the picture is a PNG, name it <something>.png")
    if "run" in own:
        if overrides:
            raise ConfigError(
                f"{overrides[0]} is given beside run={own['run']}, whose config.yaml says all; leave it out"
            )
        name, drawn = of_run(Path(own["run"]), own.get("layer"))
    elif "layer" in own:
        raise ConfigError(f"layer is {own['layer']} but there is no run; add run=runs/<name>, or leave layer out")
    elif "attention=all" in overrides:
        return _draw_all([word for word in overrides if word != "attention=all"], out)
    else:
        config = compose(overrides)
        drawn, remark = untrained(config)
        name = f"{config.attention.name} ({remark})" if remark else config.attention.name
    pattern_picture.save(drawn, out, name)
    return [f"{out}: {name}, density {drawn.density:.4g}"]


def untrained(config: Config, limit: int = MAX_PANELS) -> tuple[TileMap, str]:
    """What one layer reads in one document of data.context tokens, and a remark where that depends on the input.

    Raises ConfigError when the variant cannot reach what is asked (a density, say) or has nothing to draw.
    """
    embed_dim, heads, kv_heads, head_dim, _ = config.model.widths
    context, causal = config.data.context, config.objective == "causal"
    shape = AttentionShape(heads, kv_heads, head_dim, embed_dim, causal=causal, context=context)
    torch.manual_seed(config.seed)
    core: AttentionCore = config.attention.build(shape)
    ctx = SequenceContext(positions=torch.arange(context)[None])
    try:
        return of_core(core, context, ctx, limit=limit), UNTRAINED if isinstance(core, Chooser) else ""
    except ConfigError:
        raise
    except NotImplementedError as error:
        raise ConfigError(f"attention is {config.attention.name}, which cannot be drawn: {error}") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _draw_all(overrides: Sequence[str], out: Path) -> list[str]:
    """The gallery, densest first; a variant that cannot do what the overrides ask is left out and named."""
    own = next((word for word in overrides if word.lstrip("+~").startswith("attention.")), None)
    if own is not None:
        raise ConfigError(
            f"{own} is given beside attention=all, which draws every variant as in its YAML; name one variant"
        )
    drawn: dict[str, tuple[TileMap, str]] = {}
    left_out: dict[str, ConfigError] = {}
    for path in sorted((conf_dir() / "attention").glob("*.yaml")):
        config = compose(["data.context=8192", *overrides, f"attention={path.stem}"])
        try:
            drawn[path.stem] = untrained(config, limit=1)
        except ConfigError as error:
            left_out[path.stem] = error
    if not drawn:
        raise next(iter(left_out.values()))
    by_density = dict(sorted(drawn.items(), key=lambda item: -item[1][0].density))
    pattern_picture.save_gallery(by_density, out)
    lines = [f"{out}: " + ", ".join(f"{name} {each.density:.3g}" for name, (each, _) in by_density.items())]
    return lines + [f"{name} is left out: {error}" for name, error in left_out.items()]


def _own_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own `key=value` words (the last of each), and the overrides."""
    own = {key: value for key, mark, value in (word.partition("=") for word in words) if mark and key in OWN}
    return own, [word for word in words if word.partition("=")[0] not in OWN or "=" not in word]


if __name__ == "__main__":
    sys.exit(main())
