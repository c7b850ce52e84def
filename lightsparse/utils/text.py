"""Numbers and errors in words."""

from __future__ import annotations

_GIB = 2**30


def count_text(value: float) -> str:
    """1500 → 1.5k, 2e6 → 2M: a count as one reads it on an axis."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """`41 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes in words: `350 MiB`, `2.4 GiB`."""
    return f"{count / 2**20:,.0f} MiB" if count < 0.95 * _GIB else f"{count / _GIB:,.1f} GiB"


def first_line(error: BaseException) -> str:
    """What an error says, as part of a sentence: its first line, with the next where that only announces it."""
    line, _, rest = str(error).strip().partition("\n")
    if line.endswith(":") and rest:
        line = f"{line} {rest.strip().partition(chr(10))[0]}"
    return line or type(error).__name__
