"""A run directory has one writer, and a dead one does not count. What the lock itself does: test_utils_file_lock.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightsparse.config.targets import ConfigError
from lightsparse.training.checkpoints.lock import holder, lock, unlock

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
        assert str(holder(tmp_path)).startswith(f"process {other.pid} on ")
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    before = (tmp_path / ".lock").read_text()
    assert holder(tmp_path) is None and (tmp_path / ".lock").read_text() == before
    assert lock(tmp_path)
    assert not lock(tmp_path) and holder(tmp_path) is None  # one's own is no other
    unlock(tmp_path)


@pytest.mark.multiprocess
def test_a_forked_worker_has_nothing_of_its_parents(tmp_path: Path) -> None:
    lock(tmp_path)
    worker = os.fork()
    if worker == 0:
        os._exit(0 if f"process {os.getppid()} on" in str(holder(tmp_path)) else 1)
    assert os.waitpid(worker, 0)[1] == 0
    unlock(tmp_path)
