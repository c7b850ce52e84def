"""One writer per run directory, by its file lock."""

from __future__ import annotations

from pathlib import Path

from filelock import BaseFileLock

from lightsparse.config.targets import ConfigError
from lightsparse.utils.file_lock import LOCK, LockHeldError, sign, take

_held: dict[Path, BaseFileLock] = {}  # hidden state: what this process has taken, until `unlock` or its end


def lock(folder: Path) -> bool:
    """Take the folder for this process; false where it has it already.

    Raises ConfigError where another process has it, and where the system gives no lock.
    """
    folder = folder.resolve()
    if _is_ours(folder):
        return False
    try:
        _held[folder] = take(folder, ConfigError)
    except LockHeldError as error:
        raise ConfigError(
            f"{folder} is being written by {error}; wait until it has ended, or use name=<another> to start beside it"
        ) from error
    sign(_held[folder])
    return True


def holder(folder: Path) -> str | None:
    """Who else is writing the folder, or None. Has a free lock for a moment only, and writes nothing."""
    if _is_ours(folder.resolve()) or not (folder / LOCK).exists():
        return None
    try:
        take(folder, ConfigError).release()
    except LockHeldError as error:
        return str(error)
    return None


def unlock(folder: Path) -> None:
    """Let others write."""
    if (lock := _held.pop(folder.resolve(), None)) is not None:
        lock.release()


def _is_ours(folder: Path) -> bool:
    return folder in _held and _held[folder].is_locked  # a forked worker has the entry and not the lock
