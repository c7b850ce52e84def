"""A folder has one owner, among processes and users, also on a file system without locks; a dead owner is none."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightsparse.utils.file_lock import LockHeldError, sign, take

HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
from lightsparse.utils.file_lock import sign, take
def missing(*given): raise OSError(errno.ENOSYS, "Function not implemented")
if "no-locks" in sys.argv: fcntl.flock = missing
lock = take(Path(sys.argv[1]), ValueError)
sign(lock)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other() -> Iterator[Callable[..., subprocess.Popen]]:
    """Another process that has the lock of a folder."""
    started = []

    def start(folder: Path, *words: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *words], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.multiprocess
def test_a_second_owner_is_told_the_first_until_that_has_ended_however_it_ended(tmp_path: Path, other) -> None:
    process = other(tmp_path)
    named = f"process {process.pid} on {socket.gethostname()}"
    with pytest.raises(LockHeldError, match=f"^{re.escape(named)}$"):
        take(tmp_path, ValueError)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    take(tmp_path, ValueError).release()


@pytest.mark.multiprocess
def test_where_the_file_system_has_no_locks_the_file_is_one(tmp_path: Path, other, monkeypatch, caplog) -> None:
    process = other(tmp_path, "no-locks")
    without_locks(monkeypatch, errno.ENOSYS)
    hint = f"(if it was killed on another machine than this one, remove {tmp_path / '.owner'})"
    with pytest.raises(LockHeldError) as refused:
        take(tmp_path, ValueError)
    assert str(refused.value) == f"process {process.pid} on {socket.gethostname()} {hint}"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".owner").exists()  # nobody has removed it
    lock = take(tmp_path, ValueError)
    sign(lock)
    assert (tmp_path / ".owner").read_text().startswith(f"{os.getpid()}\n")
    assert f"{tmp_path}/.owner stands for a lock" in caplog.text
    lock.release()
    assert not (tmp_path / ".owner").exists()


def test_without_locks_an_owner_of_another_machine_is_never_taken_for_dead(tmp_path: Path, monkeypatch) -> None:
    without_locks(monkeypatch, errno.ENOSYS)
    (tmp_path / ".owner").write_text("1\nanother-machine\n")
    os.utime(tmp_path / ".owner", (0, 0))
    with pytest.raises(LockHeldError, match=r"^process 1 on another-machine \(if it was killed on another machine"):
        take(tmp_path, ValueError)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_lock_that_the_system_does_not_give_is_one_sentence(tmp_path: Path, number: int, monkeypatch) -> None:
    without_locks(monkeypatch, number)
    wanted = rf"^{re.escape(str(tmp_path))}/\.lock cannot be locked \({os.strerror(number)}\), and .* with locks$"
    with pytest.raises(ValueError, match=wanted):
        take(tmp_path, ValueError)


def as_user(user: int, group: int, function: Callable[[], None]) -> int:
    """How a function ends in a process of that user: 0, or 1 after an error."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        os.umask(0o002)
        function()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.multiprocess
@pytest.mark.skipif(os.geteuid() != 0, reason="takes on the identity of two users")
def test_a_colleague_of_the_same_group_may_continue_and_a_stranger_gets_a_sentence() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o775)
        os.chown(folder, 5001, 6001)

        def work() -> None:
            take(folder, ValueError).release()

        def refused() -> None:
            with pytest.raises(ValueError, match=r"cannot be locked \(Permission denied\).*writable for this user"):
                work()

        assert as_user(5001, 6001, work) == as_user(5002, 6001, work) == 0
        assert as_user(5003, 6003, refused) == 0
        (folder / ".lock").chmod(0o644)  # as another program may have left it
        assert as_user(5002, 6001, refused) == 0


@pytest.mark.multiprocess
def test_a_forked_worker_does_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path: Path) -> None:
    lock = take(tmp_path, ValueError)
    begun, has_begun = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(has_begun, b"." if not lock.is_locked else b"!")
        signal.pause()  # ended by the signal below
        os._exit(0)
    assert os.read(begun, 1) == b"."
    with pytest.raises(LockHeldError):
        take(tmp_path, ValueError)  # the worker has not released it
    lock.release()  # as the parent's end would do
    try:
        take(tmp_path, ValueError).release()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
