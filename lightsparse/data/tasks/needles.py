"""RULER's needles in a haystack: magic values of keys, hidden in a repeated sentence, in real text or among their like.

Hsieh et al. 2024, arXiv 2404.06654, section 3.1: single 1, 2, 3; multikey 1, 2, 3; multivalue; multiquery.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, repeat
from typing import Literal

from lightsparse.data.documents import divided, is_held_out
from lightsparse.data.errors import DataError
from lightsparse.data.stdlib import StdlibData
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.text_task import Needle, Problem, TextTask
from lightsparse.data.tasks.words import key_words, number, uuid
from lightsparse.data.text import TextConfig
from lightsparse.data.tokenizer import Bytes

_REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_ESSAY_LINES = 200_000  # of the corpus that are used at most


@dataclass(frozen=True, kw_only=True)
class Needles(TextTask):
    """`keys` keys with `values` values each, of which `queries` keys are asked for."""

    haystack: Literal["repeat", "essay", "needles"] = "repeat"
    keys: int = 1  # hidden, those not asked for distract
    values: int = 1  # of each key
    queries: int = 1  # keys asked for
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    essays: TextConfig | None = None  # haystack=essay: corpus whose validation text is read; null = stdlib

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("keys", 1), ("values", 1), ("queries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.queries > self.keys:
            raise ValueError(f"data.queries is {self.queries} and data.keys {self.keys}; only keys can be asked for")
        if self.essays is not None and self.haystack != "essay":
            raise ValueError(f"data.essays is given and data.haystack is {self.haystack}; use haystack=essay")

    def problem(self, draws: Draws) -> Problem:
        depth = self.drawn_depth(draws)
        found: dict[str, list[str]] = {}
        while len(found) < self.keys:
            found.setdefault(self._key(draws), [self._value(draws) for _ in range(self.values)])
        asked = list(found)[: self.queries]
        needles: list[Needle] = []
        for key, values in found.items():
            for value in values:
                first = not needles  # this one stands at the depth that was asked for
                needles.append(Needle(self._sentence(key, value), depth if first else draws.chance(), key in asked))
        several = self.values * self.queries > 1
        kind = self.value if several else self.value.removesuffix("s")
        named = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        one = "A special magic" if not several else "Some special magic"
        return Problem(
            head=f"{one} {kind} {'are' if several else 'is'} hidden within the following text. "
            f"Make sure to memorize it. I will quiz you about the {kind} afterwards.\n",
            filler=self._filler(draws, found),
            needles=needles,
            question=f"What {'are all' if several else 'is'} the special magic {kind} for {named} mentioned in the "
            f"provided text? The special magic {kind} for {named} mentioned in the provided text "
            f"{'are' if several else 'is'}",
            references=tuple(value for key in asked for value in found[key]),
        )

    def _key(self, draws: Draws) -> str:
        return key_words(draws) if self.key == "words" else uuid(draws)

    def _value(self, draws: Draws) -> str:
        return number(draws) if self.value == "numbers" else uuid(draws)

    def _sentence(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}.\n"

    def _filler(self, draws: Draws, taken: dict[str, list[str]]) -> Iterator[str]:
        if self.haystack == "repeat":
            return repeat(_REPEATED)
        if self.haystack == "essay":
            lines = _essay_lines(replace(self.essays or StdlibData(), tokenizer=Bytes()))
            start = draws.one_below(len(lines))
            return (lines[(start + i) % len(lines)] for i in range(10**9))
        return self._like(draws, taken)

    def _like(self, draws: Draws, taken: dict[str, list[str]]) -> Iterator[str]:
        """Needles of other keys without end."""
        while True:
            key = self._key(draws)
            if key not in taken:
                yield self._sentence(key, self._value(draws))


@lru_cache(maxsize=2)
def _essay_lines(source: TextConfig) -> tuple[str, ...]:
    """The lines of the documents held out for validation."""
    lines = (
        line + "\n"
        for document in divided(source.documents_after, source.val_fraction)(0)
        if is_held_out(document, source.val_fraction)
        for piece in document.pieces()
        for line in piece.splitlines()
        if line.strip()
    )
    found = tuple(islice(lines, _ESSAY_LINES))
    if not found:
        raise DataError("data.essays holds no validation text; raise its val_fraction or use data.haystack=repeat")
    return found
