"""Checkpoints on disk: which there are, whether they are whole, and what they hold.

A checkpoint is the file step-<n>.ckpt, a zip archive of torch.save, or, from ranks that shard their parameters, a
folder of that name (distributed/sharded_files.py). Both hold the same, and any strategy reads either.
"""

from __future__ import annotations

import logging
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

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
    names = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.ckpt"))
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and path of the newest whole checkpoint, or None. Damaged ones are passed over, with a warning each."""
    for step, path in reversed(checkpoint_steps(folder).items()):
        damage = damage_of(path)
        if damage is None:
            return step, path
        log.warning("%s IS DAMAGED (%s) and is passed over for an older checkpoint", path, damage)
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every part of either kind has a checksum. Reads all of it.

    A whole file is damaged, too, where weights or optimizer states are NaN or infinite; folders are not read for that,
    because their tensors may be larger than the memory of a rank.
    """
    if path.is_dir():
        return sharded_files.damage_of_folder(path)
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        if part is None:
            return not_finite(read_checkpoint(path))  # torch reads the archive's frame more strictly, too
    except _DAMAGE as error:
        return f"no whole archive: {str(error).splitlines()[0]}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return f"the checksum of {part} differs"


def described_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of either kind, for its plain values and the shapes of its tensors."""
    return sharded_files.described(path) if path.is_dir() else read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of either kind, whole tensors on the CPU; nothing of it is run."""
    if path.is_dir():
        return sharded_files.read(path)
    # Mapped, not read: what the caller has no use for is left where it is.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
