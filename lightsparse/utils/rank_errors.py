"""What goes wrong between ranks, as errors with a name: libraries raise a plain RuntimeError for all of it.

And the one ending that every floor needs: at once, with a sentence and a code (training/endings.py has them all).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist

from lightsparse.utils.compat.torch import GONE, LATE, SPEAKERS

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and worth another try


def leave(code: int, sentence: str = "") -> NoReturn:
    """End this process here and now, whatever its threads are doing, with the sentence on stderr."""
    try:
        sys.stderr.write(f"{sentence}\n" if sentence else "")
        sys.stderr.flush()
    finally:
        os._exit(code)


class RankError(RuntimeError):
    """The ranks of a job can no longer work together; restarted, the job continues from its last checkpoint."""


class LostRankError(RankError):
    """Another rank has ended or cannot be reached."""


class RankTimeoutError(RankError):
    """Another rank has not come to a joint step within the timeout."""


@contextmanager
def ranks_named(seconds: float | None = None) -> Iterator[None]:
    """Turn the errors of collectives within into LostRankError or RankTimeoutError; other errors pass unchanged."""
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:  # DistError is one
        named = named_error(error, seconds)
        if named is None:
            raise
        raise named from error


def named_error(error: BaseException, seconds: float | None = None) -> RankError | None:
    """The RankError behind an error of a collective, or None when it is about something else."""
    text = str(error).lower()
    if not isinstance(error, dist.DistError) and not any(word in text for word in SPEAKERS):
        return None
    who = f"rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "this rank"
    if any(word in text for word in GONE):
        return LostRankError(f"{who} has lost another rank, which ended or cannot be reached")
    if any(word in text for word in LATE):
        within = f" within {seconds:g} s (strategy.timeout)" if seconds is not None else ""
        return RankTimeoutError(f"{who} has waited for another rank, which did not come to the same step{within}")
    return None
