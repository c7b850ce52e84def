"""A text in pieces: how a document that does not fit in memory gets the very tokens of one that does.

Every text is cut by the same rule, which depends on the text alone and not on how it was read: before the first plain
space after PIECE characters that follows no other white space, or after LONGEST characters where there is none. Words
are not cut there, and no token of a byte-level BPE reaches across: its pre-tokenizers (GPT-2's and GPT-4's) begin a new
word at such a space. So cutting changes no token of such a tokenizer but at a cut after LONGEST characters without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE = 1 << 15  # characters
LONGEST = 2 * PIECE


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
