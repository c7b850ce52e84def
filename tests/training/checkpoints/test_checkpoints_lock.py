"""A run directory has one writer, and a dead one does not count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightsparse.config.targets import ConfigError
from lightsparse.training.checkpoints.lock import lock, unlock

HOLD = """
import sys, time
from pathlib import Path
from lightsparse.training.checkpoints.lock import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.multiprocess
def test_a_second_writer_is_refused_until_the_first_has_ended_however_it_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"is being written by process {other.pid} on .*; wait until it has"):
            lock(tmp_path)
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    lock(tmp_path)
    lock(tmp_path)  # one's own is no other
    unlock(tmp_path)


@pytest.mark.multiprocess
def test_a_forked_worker_does_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path: Path) -> None:
    lock(tmp_path)
    begun, has_begun = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(has_begun, b".")
        signal.pause()  # ended by the signal below
        os._exit(0)
    assert os.read(begun, 1) == b"."
    unlock(tmp_path)  # as the parent's end would do
    try:
        lock(tmp_path)
        unlock(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
