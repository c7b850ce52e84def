"""Text from a trained model, as text: pieces that can be shown at once, and stop strings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from lightsparse.models.generation import Generation
from lightsparse.models.sampling import Sampling
from lightsparse.models.transformer import Transformer

_CUT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of part of a character


class Tokenizer(Protocol):
    @property
    def bos(self) -> int: ...

    @property
    def unsettled(self) -> Collection[int]: ...

    def encode(self, text: str) -> Iterable[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def document_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a document that begins with this text, as training sees it."""
    return [tokenizer.bos, *map(int, tokenizer.encode(text))]


class TextStream:
    """Tokens of one row in, text out as soon as it is certain. The pieces together are the text of all tokens.

    A character whose bytes are spread over several tokens comes whole. Text that may be the beginning of a stop string
    waits until it is known not to be; at the first stop string the stream ends before it.

    stop    strings, none of them empty
    before  tokens that the row follows: the pieces are what it adds to their text, spaces at its beginning included
    ended   whether a stop string has come
    Raises ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Iterable[int] = ()):
        if "" in stop:
            raise ValueError("stop holds an empty string, which ends every text at once; leave it out")
        self.tokenizer, self.stop, self.ended = tokenizer, tuple(stop), False
        self._ids = [token for token in before if token != tokenizer.bos]  # the last ones, enough to decode the next
        self._settled = len(self._ids)  # of them, those whose text no token after them changes
        self._given = len(tokenizer.decode(self._ids).removesuffix(_CUT))  # characters of their text
        self._waiting = ""  # text that a stop string may begin with

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token)
        if token in self.tokenizer.unsettled:
            return ""
        text = self.tokenizer.decode(self._ids)
        # Of a cut character its last sign alone may become another: it stands for the bytes of one that is not whole.
        piece = text.removesuffix(_CUT)[self._given :]
        self._given += len(piece)
        if self._given == len(text):
            recent = self._ids[self._settled :]
            if self.tokenizer.decode(recent):  # a text's first token may lose its space, those after the first do not
                self._ids, self._given = recent, len(self.tokenizer.decode(recent))
            self._settled = len(self._ids)
        return self._without_stop(piece)

    def finish(self) -> str:
        """What is left when no token follows."""
        text = self._without_stop(self.tokenizer.decode(self._ids)[self._given :])
        rest, self._waiting, self._ids, self._given = ("" if self.ended else self._waiting), "", [], 0
        return text + rest

    def _without_stop(self, new: str) -> str:
        if self.ended:
            return ""
        text = self._waiting + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        self.ended = bool(found)
        certain = min(found) if found else len(text) - self._beginning_of_a_stop(text)
        self._waiting = "" if found else text[certain:]
        return text[:certain]

    def _beginning_of_a_stop(self, text: str) -> int:
        """Characters at the end of the text that some stop string begins with, the most."""
        longest = max(map(len, self.stop), default=0) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)


def text_after(tokenizer: Tokenizer, before: Iterable[int], ids: Iterable[int]) -> str:
    """What tokens add to the text of those before them; by themselves they might lose the space they begin with."""
    stream = TextStream(tokenizer, before=before)
    return "".join(map(stream.add, ids)) + stream.finish()


def stream_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop: Sequence[str] = (),
) -> Iterator[list[str | None]]:
    """Continuations of prompts, given as token ids: per step and row the new piece of text, behind the prompt's.

    A row ends with its document (the tokenizer's bos), before a stop string, or after max_new_tokens; then its pieces
    are None. The other arguments, and what is raised at the first step, are those of Generation and TextStream.
    """
    streams = [TextStream(tokenizer, stop, prompt) for prompt in prompts]
    steps = Generation(
        model, prompts, max_new_tokens, sampling=sampling, generator=generator, stop_tokens=(tokenizer.bos,)
    )
    over = [False] * len(prompts)
    for tokens in steps:
        pieces: list[str | None] = []
        for row, (token, stream) in enumerate(zip(tokens, streams, strict=True)):
            piece = None if over[row] else ""
            if token is not None:
                piece = stream.add(token)
            if stream.ended:
                steps.end(row)
            if steps.ended[row] and not over[row]:
                piece, over[row] = (piece or "") + stream.finish(), True
            pieces.append(piece)
        yield pieces
