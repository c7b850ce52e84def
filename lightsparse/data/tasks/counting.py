"""RULER's aggregation: the words that occur most often in a list (common words) or in a coded text (frequent words).

Hsieh et al. 2024, arXiv 2404.06654, section 3.3. Which words are common is known only after the whole text, so there is
no depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightsparse.data.errors import DataError
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.text_task import Problem, TextTask
from lightsparse.data.tasks.words import coded_words


@dataclass(frozen=True, kw_only=True)
class _Counting(TextTask):
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None:
            raise ValueError(
                f"data.depth is {self.depth}, but the words asked for stand everywhere; use data.depth=null"
            )

    @property
    def has_depth(self) -> bool:
        return False

    def _room(self, characters: int) -> int:
        """Characters of text that surely fit beside `characters` others, if every token is one byte."""
        return self.context - characters


@dataclass(frozen=True, kw_only=True)
class CommonWords(_Counting):
    """`common` words `repeats` times each among as many others, `others_repeats` times each, as fit; all shuffled."""

    context: int = 8192
    common: int = 10
    repeats: int = 30
    others_repeats: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.common < 1 or not 1 <= self.others_repeats < self.repeats:
            raise ValueError(
                f"data.common is {self.common}, data.repeats {self.repeats} and data.others_repeats "
                f"{self.others_repeats}; needed are common ≥ 1 and repeats > others_repeats ≥ 1"
            )

    def problem(self, draws: Draws) -> Problem:
        head = "Below is a numbered list of words. In these words, some appear more often than others. "
        head += "Memorize the ones that appear most often.\n"
        question = f"\nQuestion: What are the {self.common} most common words in the above list? Answer: The top "
        question += f"{self.common} words that appear most often in the list are:"
        room = self._room(len(head) + len(question) + 8 * self.common + 8)
        entry = len(f"{room // 10}. ") + 7  # characters of the longest entry of the list
        spots = room // entry - self.common * self.repeats
        others = spots // self.others_repeats
        if others < 1:
            raise DataError(
                f"data.context is {self.context}, too short for {self.common} words {self.repeats} times each among "
                "others; raise data.context or lower data.common or data.repeats"
            )
        words = coded_words(draws, self.common + others)
        asked = words[: self.common]
        listed = draws.shuffled(asked * self.repeats + words[self.common :] * self.others_repeats)
        return Problem(
            head=head,
            filler=(f"{i}. {word} " for i, word in enumerate(listed, 1)),
            needles=[],
            question=question,
            references=tuple(asked),
            needed=True,
        )


@dataclass(frozen=True, kw_only=True)
class FrequentWords(_Counting):
    """Coded words whose counts fall as rank^−alpha (Zipf); the first rank is noise, asked are the next three."""

    alpha: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha <= 1:
            raise ValueError(f"data.alpha is {self.alpha}; the exponent of Zipf's law must be above 1")

    def problem(self, draws: Draws) -> Problem:
        head = "Read the following coded text and track the frequency of each coded word. "
        head += "Find the three most frequently appeared coded words.\n"
        question = "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
        question += "frequently appeared words in the above coded text? Answer: According to the coded text above, the "
        question += "three most frequently appeared words are:"
        spots = self._room(len(head) + len(question) + 40) // 7
        ranks = np.arange(1, max(5, self.context // 50) + 1, dtype=np.float64)
        shares = ranks**-self.alpha
        counts = np.maximum(1, np.floor(shares / shares.sum() * spots).astype(np.int64))
        if spots < 10 or len(set(counts[:5].tolist())) < 5:
            raise DataError(
                f"data.context is {self.context}, too short for the three most frequent words to stand out; raise it"
            )
        words = ["....", *coded_words(draws, len(ranks) - 1)]
        text = [word for word, count in zip(words, counts.tolist(), strict=True) for _ in range(count)][:spots]
        return Problem(
            head=head,
            filler=(f"{word} " for word in draws.shuffled(text)),
            needles=[],
            question=question,
            references=tuple(words[1:4]),
            needed=True,
        )
