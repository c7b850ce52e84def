"""Checkpoints on disk: which there are, whether they are whole, and what they hold.

A checkpoint is the file step-<n>.ckpt, a zip archive of torch.save, or, from ranks that shard their parameters, a
folder of that name (distributed/sharded_files.py). Both hold the same, and any strategy reads either.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from lightsparse.config.targets import ConfigError
from lightsparse.distributed import sharded_files
from lightsparse.training.checkpoints.finite import not_finite

log = logging.getLogger(__name__)

# What the readers of an archive raise where its bytes make no sense.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError),
    *(EOFError, LookupError, NotImplementedError, RuntimeError, ValueError),
)
_NAME = re.compile(r"step-(\d+)\.ckpt")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.ckpt"


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, oldest first. Other files, half-written ones among them, are not listed."""
    try:
        names = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:  # it may hold checkpoints: a run must not take it for empty
        raise _unopened(folder, error) from error
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and path of the newest whole checkpoint, or None. Damaged ones are passed over, with a warning each.

    Raises ConfigError for one that cannot be opened: it may be whole, and what starts from an older one replaces it.
    """
    for step, path in reversed(checkpoint_steps(folder).items()):
        damage = damage_of(path)
        if damage is None:
            return step, path
        log.warning("%s IS DAMAGED (%s) and is passed over for an older checkpoint", path, damage)
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every part of either kind has a checksum. Reads all of it.

    A whole file is damaged, too, where weights or optimizer states are NaN or infinite; folders are not read for that,
    because their tensors may be larger than the memory of a rank. Raises ConfigError where it cannot be opened.
    """
    try:
        if path.is_dir():
            return sharded_files.damage_of_folder(path)
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        if part is None:
            return not_finite(read_checkpoint(path))  # torch reads the archive's frame more strictly, too
    except (OSError, UnicodeEncodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EINVAL:  # an offset in it leads nowhere
            return "no whole archive: an offset before its beginning"
        raise _unopened(path, error) from error
    except _DAMAGE as error:
        return f"no whole archive: {str(error).splitlines()[0]}"
    return f"the checksum of {part} differs"


def _unopened(path: Path, error: OSError | UnicodeEncodeError) -> ConfigError:
    why = error.strerror if isinstance(error, OSError) else f"its name is not in this locale's {error.encoding}"
    return ConfigError(
        f"{path} cannot be opened ({why}) and may be whole, so that nothing starts without it; make it readable for "
        "this user, or use name=<another> to start beside it"
    )


def described_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of either kind, for its plain values and the shapes of its tensors."""
    return sharded_files.described(path) if path.is_dir() else read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of either kind, whole tensors on the CPU; nothing of it is run."""
    if path.is_dir():
        return sharded_files.read(path)
    if os.fsencode(path) == str(path).encode(errors="surrogatepass"):
        # Mapped, not read: what the caller has no use for is left where it is.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file:  # torch maps files by their UTF-8 name, and this locale writes another
        return torch.load(file, map_location="cpu", weights_only=True)
