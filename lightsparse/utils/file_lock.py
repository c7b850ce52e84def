"""The one file lock: of a run directory, of a sweep, of a folder of prepared text.

The system releases it when its process ends, however it ends, and a forked worker does not hold it. On a file system
without locks (Lustre mounted so, some FUSE) the existence of a file is the lock, with its owner's process and machine
in it: an owner that is gone is noticed on that machine; from another one the file has to be removed by hand.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)

LOCK, OWNER = ".lock", ".owner"  # the file that is locked, and the one that stands for a lock
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP)


class LockHeldError(RuntimeError):
    """Another process has the lock; the message names it."""


def take(folder: Path, refusal: type[Exception], *, wait: bool = False) -> BaseFileLock:
    """The lock of an existing folder, until its `release` or the end of this process.

    Raises LockHeldError where another process has it, unless this one waits, and `refusal` with a sentence where the
    system gives no lock.
    """
    path, hint = folder / LOCK, ""
    try:
        try:
            # Not filelock's own fallback, with which some releases remove the file of an owner that lives.
            return FileLock(path, thread_local=False, fallback_to_soft=False).acquire(blocking=wait).lock
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            path = folder / OWNER
            hint = f" (if it was killed on another machine than this one, remove {path})"
            # Not tried once only: the first try may do no more than remove the file of an owner that is gone.
            return SoftFileLock(path, thread_local=False).acquire(timeout=-1 if wait else 0.5).lock
    except Timeout as error:
        raise LockHeldError(_name_in(path) + hint) from error
    except OSError as error:
        raise refusal(
            f"{path} cannot be locked ({error.strerror}), and a second writer would not be noticed; make it writable "
            "for this user, or use a folder on a file system with locks"
        ) from error


def sign(lock: BaseFileLock) -> None:
    """Have others who want the lock read this process's name; the file of a SoftFileLock holds it already."""
    if isinstance(lock, SoftFileLock):
        log.warning("%s stands for a lock, which its file system does not have", lock.lock_file)
    else:
        Path(lock.lock_file).write_text(f"{os.getpid()}\n{socket.gethostname()}\n")


def _name_in(path: Path) -> str:
    with suppress(FileNotFoundError):  # released meanwhile
        pid, machine, *_ = [*path.read_text().split(), "", ""]
        if machine:
            return f"process {pid} on {machine.partition('?')[0]}"  # behind it filelock names the container
    return "another process"
