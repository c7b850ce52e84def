"""Files that are either whole or not there: write beside, flush to disk, rename."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from lightsparse.utils.refusal import Refusal

log = logging.getLogger(__name__)

_unsynced: set[int] = set()  # hidden state: devices whose file system has been named
_SUFFIX = ".partial"  # no reader of a run directory looks at names that end so


class DiskFullError(RuntimeError):
    """A file of the run could not be written for want of space; what it would have replaced is whole."""


def writable(folder: Path, word: str = "out") -> Path:
    """The folder itself, which is not made. Raises Refusal where nothing can be written there, with the word that
    names another: before anything is computed.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with TemporaryFile(dir=there):
            return folder
    except OSError as error:
        raise Refusal(f"{folder} cannot be written to ({error.strerror}); use {word}=<another folder>") from error


@contextmanager
def disk_named(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" within, which libraries wrap in errors of their own, into a DiskFullError.

    path  what is being written, or a folder into which; other errors pass unchanged
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        full = _no_space(error)
        if full is None:
            raise
        if path.is_dir() and full.filename:
            path = Path(os.fsdecode(full.filename))
        folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(folder).free / 2**20
        quota = " and this user's quota is used up" if full.errno == errno.EDQUOT else ""
        raise DiskFullError(f"{path} could not be written: its disk has {free:,.0f} MiB free{quota}") from error


def _no_space(error: BaseException | None) -> OSError | None:
    """The OSError of a full disk or quota among an error and those it came from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path`, replacing what was there, once the block ends without an error.

    The bytes and the rename are on disk when this returns: neither SIGKILL nor a power cut leaves half a file. The
    folder must exist. An error inside the block leaves `path` as it was and removes the partial file.
    Raises DiskFullError where there is no space for it.
    """
    partial = path.with_name(partial_name(path.name, str(os.getpid())))
    try:
        with disk_named(path):
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`text` as the whole UTF-8 content of `path`, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def partial_name(name: str, writer: str) -> str:
    """Under which `writer` writes what will be called `name`."""
    return f".{name}.{writer}{_SUFFIX}"


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`. Only the folder's one writer may call this."""
    for partial in folder.glob(f".*{_SUFFIX}"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable; a no-op where folders cannot be opened (Windows).

    A file system that does not sync folders is named in a warning, once.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        if (device := os.fstat(descriptor).st_dev) not in _unsynced:
            _unsynced.add(device)
            log.warning("the file system of %s does not sync folders: a power cut may undo its last files", folder)
    finally:
        os.close(descriptor)
