"""How a run ends: the one place that maps an ending to an exit code and a sentence. On every rank:

0    the run is finished
1    an error of the program, or a second Ctrl-C, which waits for no step; after -m, trials have failed
2    the config, its data, the loss or the memory cannot be used; one sentence on stderr says why
75   not done, and the same command resumes the run: asked to stop (SIGTERM, SIGUSR1, SIGHUP, Ctrl-C, trainer.max_time)
     with the step saved, or before the first step or after the last one, with nothing to save; another rank lost or
     late, a disk full, a checkpoint not written in time
-15  (143 in a shell, SIGTERM) asked while Python was still importing

torchrun's own code is 1 whenever a rank's is not 0, or when it was asked to stop itself: it hands SIGTERM and Ctrl-C on
to its ranks, which save their step, and kills them after 30 seconds. With `--max-restarts` it starts all ranks again
after a 75, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightsparse.config.schema import Config
from lightsparse.distributed.strategy_config import SeveralRanks
from lightsparse.training.checkpoints.background_writer import CheckpointLateError, is_writing
from lightsparse.training.checkpoints.files import checkpoint_steps
from lightsparse.training.checkpoints.run_directory import RunDirectory
from lightsparse.training.health import NonFiniteError
from lightsparse.training.preflight.out_of_memory import MemoryShortError
from lightsparse.utils.atomic_files import DiskFullError, disk_named
from lightsparse.utils.rank_errors import EXIT_CODE, RankError, RankTimeoutError, leave, ranks_named
from lightsparse.utils.refusal import Refusal

CODES: dict[type[Exception], int] = {  # errors whose message is all that a user needs; any other keeps its traceback
    Refusal: 2,
    NonFiniteError: 2,
    MemoryShortError: 2,
    DiskFullError: EXIT_CODE,
    CheckpointLateError: EXIT_CODE,
    RankError: EXIT_CODE,
}


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Around the work of a whole process: an error of CODES ends it with its code, and its message alone.

    Not by Python's own end where that would wait for a lost rank once more, in the threads of a broken process group,
    or abort inside the library that is writing a checkpoint.
    """
    try:
        try:
            yield
        except tuple(CODES) as error:
            code = next(code for kind, code in CODES.items() if isinstance(error, kind))
            if isinstance(error, RankError):
                leave(code, str(error))
            sys.stderr.write(f"{error}\n")
            sys.exit(code)
    except SystemExit as ending:
        if is_writing():
            sys.stdout.flush()
            leave(ending.code if isinstance(ending.code, int) else 1)
        raise


@contextmanager
def resumable(config: Config) -> Iterator[None]:
    """A lost rank and a full disk get their names, and say from which step the same command continues the run."""
    directory = RunDirectory.of(config)
    timeout = config.strategy.timeout if isinstance(config.strategy, SeveralRanks) else None
    try:
        with disk_named(directory.path), ranks_named(timeout):
            yield
    except (DiskFullError, RankError) as error:
        advice = "; free some or lower checkpoint.keep" if isinstance(error, DiskFullError) else ""
        if isinstance(error, RankTimeoutError) and "strategy.timeout" not in str(error):  # from inside the attention
            advice = f" within {timeout:g} s (strategy.timeout)"
        step = max(checkpoint_steps(directory.checkpoints), default=0)
        raise type(error)(f"{error}{advice}; the same command continues from step {step}") from error
