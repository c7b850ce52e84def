"""One writer per run directory: a lock that the system lets go when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from lightsparse.config.targets import ConfigError

_held: dict[Path, int] = {}  # open as long as the process lives, or until `unlock`


def lock(folder: Path) -> bool:
    """Take the folder for this process; false where it has it already. Raises ConfigError where another one has it.

    The file stays, with the name of its last owner; only the lock on it counts. Folders on file systems without locks
    are refused, too: two writers there would not be noticed.
    """
    folder = folder.resolve()
    if folder in _held:
        return False
    path = folder / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = path.read_text().strip() or "another process"
        os.close(descriptor)
        raise ConfigError(
            f"{folder} is being written by {owner}; wait until it has ended, or use name=<another> to start beside it"
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[folder] = descriptor
    return True


def holder(folder: Path) -> str | None:
    """Who else is writing the folder, or None. Looks without taking or writing anything."""
    path = folder / ".lock"
    if folder.resolve() in _held or not path.exists():
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return path.read_text().strip() or "another process"
    finally:
        os.close(descriptor)
    return None


def unlock(folder: Path) -> None:
    """Let others write."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _forget() -> None:
    """A forked worker must not hold the lock after its parent has ended."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
