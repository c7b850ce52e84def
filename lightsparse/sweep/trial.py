"""One trial as a program of its own: its command line, its life, and how it ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lightsparse.training.preemption import Preemption
from lightsparse.utils.compat.torch import REPORT, REPORT_FIRST, REPORTED_CODE, REPORTED_RANK
from lightsparse.utils.rank_errors import EXIT_CODE

_PROGRAM = ("-m", "lightsparse", "train")
_POLL = 0.2  # seconds between looks


def trial_command(overrides: Sequence[str], ranks: int) -> list[str]:
    """What to execute: Python itself for one rank, one torchrun for several."""
    if ranks == 1:
        return [sys.executable, *_PROGRAM, *overrides]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return [sys.executable, *torchrun, *_PROGRAM, *overrides]


def trial_environment(sweep: str) -> dict[str, str]:
    """This process's variables; lightsparse can be imported, and W&B groups the runs of a sweep by its name."""
    environment = {"WANDB_RUN_GROUP": sweep, **os.environ}
    # `python train.py` finds the package beside the script; `python -m` looks in the working directory instead.
    paths = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def run_trial(command: Sequence[str], environment: dict[str, str], log: Path, preemption: Preemption) -> int:
    """Execute the command with its output appended to `log`; returns its exit code, negative for a signal.

    When this process is asked to stop, the trial is, once, and finishes its step. It lives in a session of its own:
    a Ctrl-C would otherwise reach it twice, and the second one means that it shall not save.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            told = False
            while process.poll() is None:
                if preemption.asked and not told:
                    process.terminate()
                    told = True
                time.sleep(_POLL)
        finally:
            if process.poll() is None:  # KeyboardInterrupt: a second Ctrl-C
                process.kill()
                process.wait()
    code = process.returncode
    ranks = {int(found) for found in REPORTED_CODE.findall(_written(log, start))}
    return EXIT_CODE if code and EXIT_CODE in ranks else code  # torchrun's own code is 1 whatever its ranks' is


def last_words(log: Path) -> str:
    """The last line that a trial wrote about itself; where only torchrun has written, which rank ended how."""
    written = _written(log, 0)
    root = written.rpartition(REPORT_FIRST)[2]
    lines = [line.strip() for line in written.splitlines()]
    report = next((number for number, line in enumerate(lines) if REPORT.search(line)), len(lines))
    said = [line for line in lines[:report] if line]
    if said:
        return said[-1]
    rank, code = REPORTED_RANK.search(root), REPORTED_CODE.search(root)
    return f"rank {rank[1]} ended with code {code[1]}" if rank and code else "it wrote nothing"


def _written(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
