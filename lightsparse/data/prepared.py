"""Tokens that `lightsparse prepare` has made: nothing is read but the samples, from memory maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightsparse.data.shards import Manifest, read_manifest
from lightsparse.data.source import Samples
from lightsparse.data.subwords import TOKENIZER
from lightsparse.data.text import PackedConfig
from lightsparse.data.tokenizer import load_folder
from lightsparse.data.tokens import ByteTokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True)
class PreparedData(PackedConfig):
    path: str = ""  # the folder given as out=…

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("data.path is empty; give the folder of lightsparse prepare … out=<folder>")
        if not Path(self.path).is_dir():
            raise ValueError(f"data.path is {self.path!r}, which is no folder; give that of lightsparse prepare")

    @property
    def vocab_size(self) -> int:
        return self._manifest().vocab_size

    def build_tokenizer(self) -> Tokenizer:
        folder = Path(self.path)
        return load_folder(folder) if (folder / TOKENIZER).is_file() else ByteTokenizer()

    def samples(self, seed: int, eval_tokens: int) -> Samples:
        """The very samples that the source would give under the same settings."""
        return self.samples_of(self._manifest(), self.build_tokenizer(), eval_tokens)

    def _manifest(self) -> Manifest:
        return read_manifest(Path(self.path))
