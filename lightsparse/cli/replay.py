"""Take the step again that ended a run, and say where what is no number arises.

    lightsparse replay file=runs/<name>/replay/step-<n>-rank-0.pt

The file holds the batches of one rank at that step, that of rank 0 the weights, too. They are run once more through
the model of the run's config, in fp32 and on one rank, forward and backward, without taking the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightsparse.cli.words import command, options


@dataclass(frozen=True)
class Options:
    file: str


@command
def main(words: list[str]) -> Iterable[str]:
    asked = options(Options, words)
    from lightsparse.cli.work.replay import replay

    return replay(Path(asked.file))
