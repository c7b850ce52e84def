"""The tokenizer of a run, kept in its directory: whoever opens the run again reads its text with the very same one."""

from __future__ import annotations

from pathlib import Path

from lightsparse.data.source import DataConfig
from lightsparse.data.subwords import CONFIG, TOKENIZER, SubwordTokenizer
from lightsparse.data.tokenizer import load_folder
from lightsparse.data.tokens import Tokenizer


def tokenizer_of(data: DataConfig, folder: Path) -> Tokenizer:
    """The tokenizer kept in the run directory `folder`, or, where none had to be, the one the data names.

    data  of the run's config
    """
    return load_folder(folder) if (folder / TOKENIZER).is_file() else data.build_tokenizer()


def with_run_tokenizer(data: DataConfig, folder: Path, *, resumed: bool) -> DataConfig:
    """The data under the run's tokenizer: a run that goes on takes the kept one, a new one builds its own."""
    return data.with_tokenizer(tokenizer_of(data, folder) if resumed else data.build_tokenizer())


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Put a new run's tokenizer into its directory, where it is one that has to be kept."""
    for name in (TOKENIZER, CONFIG):  # of a run that was given up before its first checkpoint
        (folder / name).unlink(missing_ok=True)
    if isinstance(tokenizer, SubwordTokenizer):
        tokenizer.save(folder)
