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


def with_kept_tokenizer(data: DataConfig, folder: Path, *, resumed: bool, write: bool) -> DataConfig:
    """The data under the run's tokenizer.

    resumed  a run that goes on takes the one it was trained with; a new one builds its own
    write    whether this process keeps it in `folder`; ranks that don't train the same BPE
    """
    if resumed:
        return data.with_tokenizer(tokenizer_of(data, folder))
    tokenizer = data.build_tokenizer()
    if write:
        for name in (TOKENIZER, CONFIG):  # of a run that was given up before its first checkpoint
            (folder / name).unlink(missing_ok=True)
        if isinstance(tokenizer, SubwordTokenizer):
            tokenizer.save(folder)
    return data.with_tokenizer(tokenizer)
