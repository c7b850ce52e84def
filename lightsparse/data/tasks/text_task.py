"""Tasks in text: a problem in words, laid out over a context of tokens of any tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lightsparse.data.errors import DataError
from lightsparse.data.source import IGNORED
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.task import Example, TaskConfig
from lightsparse.data.tokenizer import BPE, Bytes, Given, Own, TokenizerConfig
from lightsparse.data.tokens import Tokenizer

DEPTHS = 40  # of a needle, evenly spaced from 0 to 1


@dataclass(frozen=True)
class Needle:
    """A sentence to be hidden: after which share of the filler, and whether the answer needs it."""

    text: str
    depth: float
    needed: bool


@dataclass(frozen=True)
class Problem:
    """A question over a long text: head, needles among sentences of filler, question, and what is right.

    needed  whether the filler itself is what the answer needs (counting its words, say)
    """

    head: str
    filler: Iterator[str]
    needles: Sequence[Needle]
    question: str
    references: tuple[str, ...]
    separator: str = ", "  # between the references of an answer
    needed: bool = False

    @property
    def answer(self) -> str:
        return " " + self.separator.join(self.references)


@dataclass(frozen=True)
class Question:
    """A problem as tokens, int64: the prompt, and the answer that should follow; and its references as text."""

    prompt: np.ndarray
    answer: np.ndarray
    evidence: int  # token of the prompt at which the farthest needed evidence starts
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TextTask(TaskConfig):
    """A task in text. It makes `problem`; the filler is as long as data.context allows, the answer its last tokens."""

    depth: float | None = None  # share of the filler before what is asked, in [0, 1]; null = drawn from 40
    tokenizer: TokenizerConfig = field(default=Bytes(), metadata={"key": False})  # the choice tokenizer=…

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None and not 0.0 <= self.depth <= 1.0:
            raise ValueError(f"data.depth is {self.depth}; it is a share of the text and must lie in [0, 1]")

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.size()

    def choose_tokenizer(self, tokenizer: TokenizerConfig) -> TextTask:
        if isinstance(tokenizer, BPE | Own):
            raise ValueError(
                f"tokenizer is {type(tokenizer).__name__.lower()}, but a task has no text of its own to train one on; "
                "use tokenizer=bytes, or tokenizer=hf with tokenizer.path=<a run's tokenizer.json>"
            )
        return replace(self, tokenizer=tokenizer)

    def build_tokenizer(self) -> Tokenizer:
        return self.tokenizer.build(lambda characters: iter(()))

    def with_tokenizer(self, tokenizer: Tokenizer) -> TextTask:
        return replace(self, tokenizer=Given(tokenizer=tokenizer))

    @property
    def has_depth(self) -> bool:
        """Whether `depth` means something here."""
        return True

    def problem(self, draws: Draws) -> Problem:
        raise NotImplementedError(f"{type(self).__name__} has no problems")

    def score(self, text: str, references: Sequence[str]) -> float:
        """Share of the references found in a generated text, whatever the case (RULER's recall)."""
        return sum(reference.lower() in text.lower() for reference in references) / len(references)

    def new_tokens(self, question: Question) -> int:
        """Tokens to generate: the answer's, and a few for words around it."""
        return len(question.answer) + 8

    def drawn_depth(self, draws: Draws) -> float:
        """The depth of what is asked."""
        drawn = draws.one_below(DEPTHS) / (DEPTHS - 1)  # drawn in any case: the rest of the problem stays the same
        return drawn if self.depth is None else self.depth

    def question(self, draws: Draws) -> Question:
        """The problem of these draws as tokens, at most data.context + 1 of them: bos and those of its whole text.

        DataError where it cannot fit.
        """
        tokenizer, problem = self.build_tokenizer(), self.problem(draws)
        sentences: list[str] = []
        tokens, evidence = _laid_out(problem, sentences, tokenizer)
        room = self.context - sum(map(len, tokens))
        if room < 0:
            raise DataError(
                f"data.context is {self.context}, too short for a problem of {type(self).__name__}, which takes "
                f"{self.context - room} tokens without any filler; raise data.context"
            )
        sizes: dict[tuple[str, str], int] = {}  # tokens of a sentence behind another
        lengths: list[int] = []
        last = problem.head
        for sentence in problem.filler:
            if (last, sentence) not in sizes:
                sizes[last, sentence] = len(tokenizer.encode_parts([last, sentence])[1])
            room -= sizes[last, sentence]
            if room < 0:
                break
            lengths.append(sizes[last, sentence])
            sentences.append(sentence)
            last = sentence
        tokens, evidence = _laid_out(problem, sentences, tokenizer)
        while (excess := sum(map(len, tokens)) - self.context) > 0:  # a needle changes the tokens beside it
            while excess > 0 and sentences:
                sentences.pop()
                excess -= lengths.pop()
            tokens, evidence = _laid_out(problem, sentences, tokenizer)
        *prompt, answer = (part.astype(np.int64) for part in tokens)
        return Question(np.concatenate([[tokenizer.bos], *prompt]), answer, 1 + evidence, problem.references)

    def example(self, draws: Draws) -> Example:
        asked = self.question(draws)
        text = np.concatenate([asked.prompt, asked.answer])
        first, length = len(asked.prompt) - 1, len(text) - 1
        tokens = np.full(self.context, asked.prompt[0], dtype=np.int64)  # bos fills up what is left
        labels = np.full(self.context, IGNORED, dtype=np.int64)
        evidence = np.full(self.context, -1, dtype=np.int64)
        tokens[:length], labels[:length] = text[:-1], text[1:]
        evidence[first:length] = np.arange(first, length) - asked.evidence
        return Example(tokens, labels, evidence)


def first_number(text: str) -> str | None:
    found = re.search(r"\d+", text)
    return found[0] if found else None


def _laid_out(problem: Problem, sentences: Sequence[str], tokenizer: Tokenizer) -> tuple[list[np.ndarray], int]:
    """Tokens of the text by parts, the answer last, and the first one that the answer needs."""
    parts, start = [(problem.head, False)], 0
    for needle in sorted(problem.needles, key=lambda needle: needle.depth):
        place = round(needle.depth * len(sentences))
        parts += [("".join(sentences[start:place]), problem.needed), (needle.text, needle.needed)]
        start = place
    parts += [("".join(sentences[start:]), problem.needed), (problem.question, False), (problem.answer, False)]
    tokens = tokenizer.encode_parts([text for text, _ in parts])
    starts = np.cumsum([0, *map(len, tokens)])
    return tokens, min(int(at) for at, (_, needed) in zip(starts, parts, strict=False) if needed)
