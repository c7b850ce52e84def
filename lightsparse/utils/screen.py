"""What a command prints never ends it: where the reader, the terminal or the space is gone, the words alone are lost.

`| head` closes the pipe after its lines, Ctrl-C ends the `tee` behind it first, a terminal goes with its connection, a
log file fills its disk. Python raises an OSError from whatever line prints next, in the middle of a training step.

Hidden state: `sys.stdout` and `sys.stderr`.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any


class _Screen(io.FileIO):
    """A file that has taken what it could not take."""

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # full, and made non-blocking by somebody who shares it
                select.select([], [self], [])
            return written
        except OSError:
            return len(data)


def survive_the_screen() -> None:
    """From now on no failure of standard output or error is raised, nor a character that their encoding lacks."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # a notebook's, a test's, or ours already
            continue
        if stream is None:  # closed from the start; its number must not go to the next file that is opened
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
            continue
        raw = _Screen(stream.fileno(), "w", closefd=False)
        unbuffered = stream.write_through  # python -u
        buffer = raw if unbuffered else io.BufferedWriter(raw)
        kind = {"encoding": stream.encoding, "line_buffering": stream.line_buffering, "write_through": unbuffered}
        setattr(sys, name, io.TextIOWrapper(buffer, errors=errors, **kind))
