"""One writer per run directory, by its file lock."""

from __future__ import annotations

from pathlib import Path

from filelock import BaseFileLock

from lightsparse.config.targets import ConfigError
from lightsparse.utils import file_lock
from lightsparse.utils.file_lock import LockHeldError

_held: dict[Path, BaseFileLock] = {}  # hidden state: what this process has taken, until `unlock` or its end


def lock(folder: Path) -> bool:
    """Take the folder for this process; false where it has it already. Raises ConfigError where another one has it, and
    where the system gives no lock: two writers there would not be noticed."""
    folder = folder.resolve()
    if _is_ours(folder):
        return False
    try:
        _held[folder] = file_lock.acquire(folder, ConfigError)
    except LockHeldError as error:
        raise ConfigError(
            f"{folder} is being written by {error}; wait until it has ended, or use name=<another> to start beside it"
        ) from error
    return True


def holder(folder: Path) -> str | None:
    """Who else is writing the folder, or None; looks without taking it."""
    return None if _is_ours(folder.resolve()) else file_lock.holder(folder, ConfigError)


def unlock(folder: Path) -> None:
    """Let others write."""
    taken = _held.pop(folder.resolve(), None)
    if taken is not None:
        taken.release()


def _is_ours(folder: Path) -> bool:
    return folder in _held and _held[folder].is_locked  # a forked worker has the entry and not the lock
