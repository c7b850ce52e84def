"""A text in chunks: how a document that does not fit in memory gets the very tokens of one that does.

Every text is cut by the same rule, which depends on the text alone and not on how it was read: before the first plain
space after PIECE characters that follows no other white space, or after LONGEST characters where there is none. In many
tokenizers no token reaches across such a place. Each cut is then moved to where a token begins, and each chunk is
encoded behind the end of the chunk before it, since the first word of a text may get other tokens than a later one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

PIECE = 1 << 15  # characters
LONGEST = 2 * PIECE
CONTEXT = 128  # characters on either side of a place that decide where tokens begin there


class Chunk(NamedTuple):
    """A part of a text, and the end of what stands before it."""

    before: str
    text: str


def chunks(pieces: Iterable[str], border: Callable[[str, str], int]) -> Iterator[Chunk]:
    """The pieces of a text, cut where tokens begin.

    border  of a Tokenizer
    """
    before = text = ""
    for following in pieces:
        moved = border(text[-CONTEXT:], following[:CONTEXT]) if text else 0
        joined = text + following
        place = len(text) + moved
        text, following = joined[:place], joined[place:]
        if text:
            yield Chunk(before, text)
            before = (before + text)[-CONTEXT:]
        text = following
    if text:
        yield Chunk(before, text)


def cut(parts: Iterable[str], piece: int = PIECE) -> Iterator[str]:
    """The text of all `parts`, in pieces of `piece` to 2 · `piece` characters, the last one of any length."""
    text = ""
    for part in parts:
        text += part
        start = 0
        while (end := _end(text, start, piece)) is not None:
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


def _end(text: str, start: int, piece: int) -> int | None:
    """Where the piece that begins at `start` ends; None where that depends on what follows."""
    last = start + 2 * piece
    border = text.find(" ", start + piece, last)
    while border >= 0:
        if not text[border - 1].isspace():
            return border
        border = text.find(" ", border + 1, last)
    return last if len(text) >= last else None
