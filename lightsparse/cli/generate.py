"""Let a trained run write: the text streams to the terminal as it comes.

    lightsparse generate run=runs/<name> prompt="def main("
    lightsparse generate run=runs/<name> 'prompts=["Once upon", "The end"]' max_new_tokens=100 temperature=0

  run=FOLDER          a run directory; its newest whole checkpoint writes
  step=N              the checkpoint of that step instead
  prompt=TEXT         the beginning of a document, taken literally (default: nothing)
  prompts=[…]         several, in one batch; a YAML list
  max_new_tokens=200  tokens per prompt, at most; a text also ends with its document
  temperature=0.8     0 takes the likeliest token each time
  top_k=40            draw among the 40 likeliest tokens; null: all
  top_p=0.95          then among the fewest that hold this share of the probability; null: all
  seed=0              of the draws
  stop=TEXT           a text ends before this string; stop=["\\n\\n","def "] for several, a YAML list
The text goes to the standard output, everything else to the standard error. Uses CUDA where there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from lightsparse.cli.words import command, options


@dataclass(frozen=True)
class Options:
    run: str
    prompt: str | None = None
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 40
    top_p: float | None = 0.95
    seed: int = 0
    stop: tuple[str, ...] = ()
    step: int | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompts:
            raise ValueError("prompt and prompts are both given; put all of them into prompts=[…]")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2⁶³)")
        for name, texts in (("prompt", (self.prompt or "",)), ("prompts", self.prompts), ("stop", self.stop)):
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    at = error.start
                    raise ValueError(
                        f"{name} is not UTF-8 text: {text[at]!a} after {at} characters; convert it, as with iconv"
                    ) from error
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which ends every text at once; leave it out")


@command
def main(words: list[str]) -> Iterable[str]:
    asked = options(Options, words)
    from lightsparse.cli.work.generate import generate

    try:
        for piece in generate(**vars(asked)):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        raise
    return ()
