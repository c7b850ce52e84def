"""Writing checkpoints beside training: the state is copied, and written, flushed and named in a thread of its own.

Training waits for the copy only. One checkpoint is under way at a time: the next one waits for it, and the end of a run
waits `timeout` seconds at most. An error while writing is raised in the training thread, at its next step.
"""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from lightsparse.distributed import sharded_files
from lightsparse.distributed.sharded_files import Shards
from lightsparse.training.checkpoints.files import read_checkpoint
from lightsparse.utils.atomic_files import atomic_write, partial_name, sync_folder
from lightsparse.utils.compat.torch import REFUSED_OBJECT

Then = Callable[[], None]
_THREAD = "checkpoint"


class CheckpointLateError(RuntimeError):
    """A checkpoint is not on disk in time; the one before it is whole."""


def is_writing() -> bool:
    """Whether a checkpoint of this process is under way. Python's own end would abort inside the writing library."""
    return any(thread.name == _THREAD and thread.is_alive() for thread in threading.enumerate())


class CheckpointWriter(CheckpointIO):
    """Lightning's place for how checkpoints are written.

    background  write in a thread; False: be done when `save_checkpoint` returns
    timeout     seconds that `finish` waits
    storage_options of a save, where given, is a function to call once the checkpoint is on disk, in the same thread.
    """

    def __init__(self, background: bool, timeout: float) -> None:
        self.background, self.timeout = background, timeout
        self._stage = _Stage()
        self._is_readable = False  # whether a first checkpoint has been read back
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Then | None = None
    ) -> None:
        """One file, from one rank."""
        path = Path(path)
        self.finish()
        content = self._stage.copy(checkpoint) if self.background else checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)

        def write() -> None:
            if path.is_dir():  # of ranks that sharded, before the run was rolled back
                remove(path)
            with atomic_write(path) as file:
                torch.save(content, file)
                file.flush()
                self._check_readable(Path(file.name))
            if storage_options is not None:
                storage_options()

        self._run(write)

    def save_shards(
        self, rest: Any, shards: Shards, path: Path, group: dist.ProcessGroup, is_first: bool, then: Then | None
    ) -> None:
        """One folder, from all ranks, each of which calls this."""
        self.finish()
        partial = path.with_name(partial_name(path.name, "ranks"))
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            path.parent.mkdir(parents=True, exist_ok=True)
        dist.barrier(group)
        rest = self._stage.copy(rest) if self.background and is_first else rest
        shards_written = sharded_files.start_writing(partial, shards, group, background=self.background)

        def write() -> None:
            sharded_files.wait_for(shards_written)
            if not is_first:
                return
            sharded_files.finish_writing(partial, rest)
            self._check_readable(partial / sharded_files.REST)
            sync_folder(partial)
            if path.exists():  # of the same step, before it was rolled back
                remove(path)
            partial.rename(path)
            sync_folder(path.parent)
            if then is not None:
                then()

        self._run(write)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))

    def check(self) -> None:
        """Raise what went wrong in the thread, if anything has."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait until the checkpoint under way is on disk. Raises its error; CheckpointLateError after `timeout`."""
        if self._thread is not None:
            self._thread.join(self.timeout)
            if self._thread.is_alive():
                raise CheckpointLateError(
                    f"a checkpoint was not on disk after {self.timeout:g} s (checkpoint.timeout); the one before it is "
                    "whole, and the same command continues from there"
                )
            self._thread = None
        self.check()

    def _check_readable(self, file: Path) -> None:
        """Once: what a callback adds to a checkpoint may be written by every run and read by none."""
        if self._is_readable:
            return
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            raise TypeError(
                f"{file} holds a value of a callback's state that weights_only does not read back; use numbers, text, "
                f"tensors, lists and dicts there ({str(error).partition(REFUSED_OBJECT)[2][:120]})"
            ) from error
        self._is_readable = True

    def _run(self, job: Callable[[], None]) -> None:
        if not self.background:
            return job()
        # A daemon: the second Ctrl-C leaves without waiting for it; a half-written checkpoint has no valid name.
        self._thread = threading.Thread(target=self._guarded, args=(job,), name=_THREAD, daemon=True)
        self._thread.start()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # raised again by `check`, in the thread that can act on it
            self._error = error


def remove(path: Path) -> None:
    """A checkpoint of either kind; a folder loses its name first, so that a kill leaves no half of it."""
    if path.is_dir():
        shutil.rmtree(path.rename(path.with_name(partial_name(path.name, "removed"))))
    else:
        path.unlink()


class _Stage:
    """Main memory for one copy of the state; used again for the next, as new pages cost more time than copying."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, tree: Any) -> Any:
        """The same with tensors that nothing else writes to, until the next call."""
        used: dict[tuple[Any, ...], Tensor] = {}
        content = self._copied(tree, (), used)
        self._buffers = used
        return content

    def _copied(self, node: Any, path: tuple[Any, ...], used: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(node, Tensor):
            buffer = self._buffers.get(path)
            if buffer is None or buffer.shape != node.shape or buffer.dtype != node.dtype:
                buffer = torch.empty(node.shape, dtype=node.dtype)
            used[path] = buffer
            return buffer.copy_(node.detach())
        if isinstance(node, Mapping):
            return {key: self._copied(value, (*path, key), used) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(self._copied(value, (*path, i), used) for i, value in enumerate(node))
        return node
