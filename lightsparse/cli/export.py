"""A trained run as a folder that transformers loads: config.json, safetensors, tokenizer, model card.

    lightsparse export run=runs/<name> out=<folder>

  run=FOLDER   a run directory
  out=FOLDER   a new folder
  step=N       the checkpoint of that step (default: the newest)
  dtype=NAME   of the weights in the files: float32, bfloat16 or float16 (default: float32; bfloat16 after
               precision=bf16-true)
  shard=SIZE   most that one file holds (default: 5GB)

The model is a Llama, Qwen2 or Qwen3 with dense attention in transformers. lightsparse.json says which attention it was
trained with, and lightsparse.hf.register_exported(<folder>) gives it back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightsparse.cli.words import command, options


@dataclass(frozen=True)
class Options:
    run: str
    out: str
    step: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    shard: str = "5GB"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+[KMG]B", self.shard):
            raise ValueError(f"shard is {self.shard}; write a number with KB, MB or GB, such as 5GB")


@command
def main(words: list[str]) -> Iterable[str]:
    asked = options(Options, words)
    from lightsparse.cli.work.export import export

    return export(**vars(asked))
