"""Runs side by side: a table over seeds, pictures of what quality costs, one HTML file that opens offline.

    lightsparse report runs/<sweep>            # writes report.html, .csv and .png there
    lightsparse report runs/a runs/b runs/c    # run directories; writes into out=. unless given
    lightsparse report runs/<sweep> out=FOLDER

Runs that differ in their seed only are one group. Only finished runs count; the others are named.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from lightsparse.cli.words import command, options
from lightsparse.config.targets import ConfigError


@dataclass(frozen=True)
class Options:
    out: str | None = None


@command
def main(words: list[str]) -> Iterable[RenderableType]:
    folders = [word for word in words if "=" not in word or Path(word).exists()]
    asked = options(Options, [word for word in words if word not in folders])
    if not folders:
        raise ConfigError("no run is named; write lightsparse report runs/<sweep>, or run directories")
    from lightsparse.cli.work.report import as_table, report

    found, remarks, written = report([Path(folder) for folder in folders], Path(asked.out) if asked.out else None)
    return [as_table(found), *remarks, *map(str, written)]
