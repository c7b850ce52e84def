"""The choice `tokenizer=…`: a frozen config each, which says its number of ids and makes the Tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lightsparse.data.errors import DataError, reading
from lightsparse.data.subwords import CONFIG, SMALLEST, TOKENIZER, SubwordTokenizer, load_subwords, train_bpe
from lightsparse.data.tokens import ByteTokenizer, Tokenizer
from lightsparse.utils.text import first_line

CONNECT_SECONDS = 5  # within which the hub has to answer


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What a tokenizer is made from."""

    def size(self) -> int:
        """Number of ids, known without reading the corpus."""
        raise NotImplementedError(f"{type(self).__name__} has no size")

    def identity(self) -> str:
        """Differs where the tokens would."""
        return repr(self)

    def build(self, training_text: Callable[[int], Iterator[str]]) -> Tokenizer:
        """The tokenizer.

        training_text  given a number of characters, the pieces of the text to train on up to about so many
        """
        raise NotImplementedError(f"{type(self).__name__} makes no tokenizer")


@dataclass(frozen=True, kw_only=True)
class Bytes(TokenizerConfig):
    def size(self) -> int:
        return ByteTokenizer.vocab_size

    def build(self, training_text: Callable[[int], Iterator[str]]) -> Tokenizer:
        return ByteTokenizer()


@dataclass(frozen=True, kw_only=True)
class BPE(TokenizerConfig):
    vocab_size: int = 8192  # ids, the 256 bytes and two special tokens included
    train_characters: int = 100_000_000  # of the training text, from its start, that the merges are counted on

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST:
            raise ValueError(
                f"tokenizer.vocab_size is {self.vocab_size}; it counts ids and must be at least {SMALLEST}, "
                "256 bytes and two special tokens"
            )
        if self.train_characters < 1:
            raise ValueError(f"tokenizer.train_characters is {self.train_characters}; it must be at least 1")

    def size(self) -> int:
        return self.vocab_size

    def build(self, training_text: Callable[[int], Iterator[str]]) -> Tokenizer:
        return train_bpe(training_text(self.train_characters), self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(TokenizerConfig):
    path: str = ""  # a tokenizer.json, a folder with one, or the name of a model on the hub
    revision: str | None = None  # branch, tag or commit of a model on the hub
    vocab_size: int | None = None  # rows of its model's embedding, where they are more than its ids; null: its ids

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                "tokenizer.path is empty; name a tokenizer.json, a folder with one, or a model on the hub, as in "
                "tokenizer=hf tokenizer.path=openai-community/gpt2"
            )
        local = Path(os.path.expanduser(self.path))
        if local.is_dir() and not (local / TOKENIZER).is_file():
            raise ValueError(
                f"tokenizer.path is {self.path!r}, a folder without {TOKENIZER}; make one with transformers' "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        if local.exists() and self.revision is not None:
            raise ValueError(f"tokenizer.revision is {self.revision!r}, but {self.path} is local; leave it out")

    def size(self) -> int:
        return self._load().vocab_size

    def build(self, training_text: Callable[[int], Iterator[str]]) -> Tokenizer:
        return self._load()

    def identity(self) -> str:
        return self._load().fingerprint

    def _load(self) -> SubwordTokenizer:
        local = Path(os.path.expanduser(self.path))
        if local.exists():
            folder, name = (local, TOKENIZER) if local.is_dir() else (local.parent, local.name)
            return load_folder(folder, name, self.vocab_size)
        return _from_hub(self.path, self.revision, self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class Own(TokenizerConfig):
    """The one that the data brings: shards have theirs, tasks their own words."""


@dataclass(frozen=True, kw_only=True)
class Given(TokenizerConfig):
    """A tokenizer that is there already; not for conf/."""

    tokenizer: Tokenizer

    def size(self) -> int:
        return self.tokenizer.vocab_size

    def identity(self) -> str:
        return self.tokenizer.fingerprint

    def build(self, training_text: Callable[[int], Iterator[str]]) -> Tokenizer:
        return self.tokenizer


def load_folder(folder: Path, name: str = TOKENIZER, vocab_size: int | None = None) -> SubwordTokenizer:
    """The tokenizer of a model's, a run's or a prepared folder; read once per content."""
    config = folder / CONFIG
    found = [folder / name, *([config] if config.is_file() else [])]
    with reading(folder):
        key = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in found)
    return _loaded(key, vocab_size)


@lru_cache(maxsize=8)
def _loaded(files: tuple[tuple[Path, int, int], ...], vocab_size: int | None) -> SubwordTokenizer:
    paths = [path for path, *_ in files]
    return load_subwords(paths[0], paths[1] if len(paths) > 1 else None, vocab_size)


@lru_cache(maxsize=8)
def _from_hub(name: str, revision: str | None, vocab_size: int | None) -> SubwordTokenizer:
    """Downloaded, or from the hub's cache. DataError where neither has it."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    unreachable: Exception | None = None
    try:
        HfApi().model_info(name, revision=revision, timeout=CONNECT_SECONDS)  # a download would try for half a minute
    except Exception as error:  # every HTTP client the hub's package has used has classes of its own
        unreachable = error
    try:
        cached = unreachable is not None
        file = Path(hf_hub_download(name, TOKENIZER, revision=revision, local_files_only=cached))
        try:
            config = Path(hf_hub_download(name, CONFIG, revision=revision, local_files_only=cached))
        except EntryNotFoundError:
            config = None
    except Exception as error:
        reason = first_line(unreachable or error)
        raise DataError(
            f"tokenizer.path is {name!r}, which is no file or folder here and cannot be had from the hub ({reason}); "
            "without it work tokenizer=bytes, tokenizer=bpe and a local tokenizer.json"
        ) from error
    return load_subwords(file, config, vocab_size)
