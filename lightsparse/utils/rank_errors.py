"""What goes wrong between ranks, as errors with a name, and the codes with which a process ends.

Libraries raise a plain RuntimeError for all that goes wrong between ranks. The exit codes of `train.py`, on every rank:

0    the run is finished
1    an error of the program, or a second Ctrl-C, which waits for no step; after -m, trials have failed
2    the config, its data, the loss or the memory cannot be used; one sentence on stderr says why
75   not done, and the same command goes on: asked to stop (SIGTERM, SIGUSR1, Ctrl-C, trainer.max_time), with the step
     saved; asked before the first step or after the last one, with nothing to save; or another rank was lost or late, a
     disk was full, a checkpoint not written in time
-15  (143 in a shell, SIGTERM) asked while Python still imported

torchrun's own code is 1 whenever a rank's is not 0, or when it was asked to stop itself: it hands SIGTERM and Ctrl-C on
to its ranks, which save their step, and kills them after 30 seconds. With `--max-restarts` it starts all ranks again
after a 75, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lightsparse.utils.compat.torch import GONE, LATE, SPEAKERS

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and worth another try


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
