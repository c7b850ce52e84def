"""Passkey retrieval: a number hidden in a text that repeats itself (Mohtashami & Jaggi 2023, arXiv 2305.16300, 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.text_task import Needle, Problem, Question, TextTask, first_number

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True, kw_only=True)
class Passkey(TextTask):
    """A key of 1 … 50,000; right is the first number in ten greedy tokens."""

    def problem(self, draws: Draws) -> Problem:
        depth = self.drawn_depth(draws)
        key = str(1 + draws.one_below(50_000))
        return Problem(
            head="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about the important information there.\n",
            filler=repeat(_FILLER),
            needles=[Needle(f"The pass key is {key}. Remember it. {key} is the pass key.\n", depth, True)],
            question="What is the pass key? The pass key is",
            references=(key,),
        )

    def score(self, text: str, references: Sequence[str]) -> float:
        return float(first_number(text) == references[0])

    def new_tokens(self, question: Question) -> int:
        return 10
