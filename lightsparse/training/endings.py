"""How a run ends where that is no error of the program: one sentence and an exit code (utils/rank_errors has all)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightsparse.training.checkpoints.background_writer import CheckpointLateError, is_writing
from lightsparse.training.health import NonFiniteError
from lightsparse.training.preflight.out_of_memory import MemoryShortError
from lightsparse.utils.atomic_files import DiskFullError
from lightsparse.utils.rank_errors import EXIT_CODE, RankError
from lightsparse.utils.refusal import Refusal


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Around the work of a whole process: what its user can change ends it with the sentence alone.

    Not by Python's own end where that would abort inside the library that is writing a checkpoint.
    """
    try:
        try:
            yield
        except RankError as error:
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            os._exit(EXIT_CODE)  # at once: threads of a broken process group may wait for the lost rank once more
        except (Refusal, NonFiniteError, MemoryShortError, DiskFullError, CheckpointLateError) as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(EXIT_CODE if isinstance(error, DiskFullError | CheckpointLateError) else 2)
    except SystemExit as end:
        if is_writing():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
