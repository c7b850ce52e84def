"""Tokenize a source of text once, into memory-mapped shards that any number of runs read.

    lightsparse prepare data=files data.path=texts/ tokenizer=bpe out=prepared/texts
    python train.py data=prepared data.path=prepared/texts

Takes the overrides of train.py (data=…, tokenizer=…), and
  out=FOLDER      where the shards, the manifest and the tokenizer go
  shard_tokens=N  tokens of a shard (default 67108864): what a kill can cost
Memory is constant, whatever the source. The same command continues what was killed, after the last complete shard, and
says so when all is there. Split, lengths and packing are chosen when the shards are read.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from lightsparse.config.parse import compose
from lightsparse.config.targets import ConfigError
from lightsparse.data import DataError, TextConfig
from lightsparse.data.prepare import prepare
from lightsparse.data.shards import SHARD_TOKENS

OWN = ("out", "shard_tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare; returns the exit code: 0, or 2 after the one sentence that says what is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(soft_wrap=True, highlight=False, markup=False), Console(stderr=True, soft_wrap=True)
    if {"-h", "--help"} & set(given):
        console.print(__doc__)
        return 0
    try:
        for line in _prepare(given, errors):
            console.print(line)
    except (ConfigError, DataError) as error:
        errors.print(str(error), markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        errors.print("stopped; the same command continues after the last complete shard", highlight=False)
        return 130
    return 0


def _prepare(words: Sequence[str], console: Console) -> list[str]:
    own = {key: value for key, mark, value in (word.partition("=") for word in words) if mark and key in OWN}
    data = compose([word for word in words if word.partition("=")[0] not in OWN or "=" not in word]).data
    if not isinstance(data, TextConfig):
        raise ConfigError(
            f"data is {type(data).__name__}, which is no text to be prepared; use data=files, hub or stdlib"
        )
    if not own.get("out"):
        raise ConfigError("out is missing; name the folder for the shards: out=<folder>")
    folder, shard_tokens = Path(own["out"]), own.get("shard_tokens", str(SHARD_TOKENS))
    if not shard_tokens.isdecimal() or int(shard_tokens) < 1:
        raise ConfigError(f"shard_tokens is {shard_tokens}; it counts tokens and must be at least 1")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightsparse").setLevel(logging.INFO)
    started = time.perf_counter()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[tokens]}"))
    quiet = not console.is_terminal  # nothing to redraw
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=data.text_bytes(), tokens="")
        count = 0

        def begin(text_bytes: int, tokens: int) -> None:
            nonlocal count
            count = tokens
            bar.update(task, completed=text_bytes)
            if tokens:
                console.print(f"continues after {tokens:,} tokens of {text_bytes:,} bytes", highlight=False)

        def report(text_bytes: int, tokens: int) -> None:
            nonlocal count
            count += tokens
            bar.update(task, advance=text_bytes, tokens=f"{count:,} tokens")

        manifest, was_there = prepare(data, folder, shard_tokens=int(shard_tokens), begin=begin, report=report)
    seconds = time.perf_counter() - started
    done = "is complete and intact" if was_there else f"prepared in {seconds:.0f} s"
    return [
        f"{folder}: {done}: {manifest.documents:,} documents, {manifest.text_bytes:,} bytes, "
        f"{manifest.tokens:,} tokens ({manifest.tokenizer}) in {len(manifest.shards)} shards",
        f"train on it with: python train.py data=prepared data.path={folder}",
    ]


if __name__ == "__main__":
    sys.exit(main())
