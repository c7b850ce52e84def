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

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightsparse.cli.words import command, options_beside_overrides
from lightsparse.config.compose import composed, conf_dir
from lightsparse.config.targets import ConfigError


@dataclass(frozen=True)
class Options:
    out: str = "pattern.png"
    run: str | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        if not self.out.endswith(".png"):
            raise ValueError(f"out is {self.out}; the picture is a PNG, name it <something>.png")
        if self.layer is not None and self.run is None:
            raise ValueError(f"layer is {self.layer} but there is no run; add run=runs/<name>, or leave layer out")


@command
def main(words: list[str]) -> Iterable[str]:
    asked, overrides = options_beside_overrides(Options, words)
    out, own = Path(asked.out), list(Options.__dataclass_fields__)
    if asked.run is not None:
        if overrides:
            raise ConfigError(
                f"{overrides[0]} is given beside run={asked.run}, whose config.yaml says all; leave it out"
            )
        from lightsparse.cli.work.show import draw_run

        return draw_run(Path(asked.run), asked.layer, out)
    if "attention=all" not in overrides:
        raw = composed(overrides, own)
        from lightsparse.cli.work.show import draw

        return draw(raw, out)
    others = [word for word in overrides if word != "attention=all"]
    variant = next((word for word in others if word.lstrip("+~").startswith("attention.")), None)
    if variant is not None:
        raise ConfigError(
            f"{variant} is given beside attention=all, which draws every variant as in its YAML; name one variant"
        )
    names = sorted(path.stem for path in (conf_dir() / "attention").glob("*.yaml"))
    raws = {name: composed(["data.context=8192", *others, f"attention={name}"], own) for name in names}
    from lightsparse.cli.work.show import draw_all

    return draw_all(raws, out)
