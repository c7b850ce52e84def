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
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from lightsparse.cli.words import command, console, options_beside_overrides
from lightsparse.config.compose import composed
from lightsparse.config.targets import ConfigError


@dataclass(frozen=True)
class Options:
    out: str
    shard_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.shard_tokens is not None and self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens}; it counts tokens and must be at least 1")


@command
def main(words: list[str]) -> Iterable[str]:
    asked, overrides = options_beside_overrides(Options, words)
    raw = composed(overrides, own=list(Options.__dataclass_fields__))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lightsparse").setLevel(logging.INFO)
    try:
        return _prepared(raw, Path(asked.out), asked.shard_tokens)
    except KeyboardInterrupt:
        console(stderr=True).print("stopped; the same command continues after the last complete shard")
        raise


def _prepared(raw: Mapping[str, Any], folder: Path, shard_tokens: int | None) -> list[str]:
    from lightsparse.config.parse import on_this_machine, parse
    from lightsparse.data import TextConfig
    from lightsparse.data.prepare import prepare
    from lightsparse.data.shards import SHARD_TOKENS

    data = parse(on_this_machine(raw)).data
    if not isinstance(data, TextConfig):
        raise ConfigError(
            f"data is {type(data).__name__}, which is no text to be prepared; use data=files, hub or stdlib"
        )
    errors = console(stderr=True)
    started = time.perf_counter()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[tokens]}"))
    quiet = not errors.is_terminal  # nothing to redraw
    with Progress(*columns, TimeElapsedColumn(), console=errors, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=data.text_bytes(), tokens="")
        count = 0

        def begin(text_bytes: int, tokens: int) -> None:
            nonlocal count
            count = tokens
            bar.update(task, completed=text_bytes)
            if tokens:
                errors.print(f"continues after {tokens:,} tokens of {text_bytes:,} bytes")

        def report(text_bytes: int, tokens: int) -> None:
            nonlocal count
            count += tokens
            bar.update(task, advance=text_bytes, tokens=f"{count:,} tokens")

        tokens = shard_tokens or SHARD_TOKENS
        manifest, was_there = prepare(data, folder, shard_tokens=tokens, begin=begin, report=report)
    seconds = time.perf_counter() - started
    done = "is complete and intact" if was_there else f"prepared in {seconds:.0f} s"
    return [
        f"{folder}: {done}: {manifest.documents:,} documents, {manifest.text_bytes:,} bytes, "
        f"{manifest.tokens:,} tokens ({manifest.tokenizer}) in {len(manifest.shards)} shards",
        f"train on it with: python train.py data=prepared data.path={folder}",
    ]
