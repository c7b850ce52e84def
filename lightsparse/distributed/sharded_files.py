"""A checkpoint as a folder that all ranks write and any number of ranks reads: PyTorch's distributed checkpoint, DCP.

    __<rank>_0.distcp, .metadata  the shards (torch.distributed.checkpoint)
    rest.pt                       everything else, with a place where each shard belongs
    checksums*.json               CRC-32 of every file, from the rank that wrote it

All ranks write into one folder, which has to be on a disk that they share.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
    SavePlan,
    SavePlanner,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from lightsparse.utils.compat.torch import DCP_INDEX, DCP_INDEX_CLASSES, READS_ALONE

Shards = Mapping[str, DTensor]

_PLACE, _OWNER = "__shard__", "__parameter__"  # keys of what stands in rest.pt for a shard
REST = "rest.pt"
_LAST = "checksums.json"
_PIECE = 1 << 24  # bytes read at a time


def separated(tree: Any, owner: Callable[[tuple[Any, ...]], str | None]) -> tuple[Any, dict[str, DTensor]]:
    """A checkpoint's content without its shards, and the shards by name.

    owner  the parameter that a shard at this path of keys belongs to, and is split like; None where there is none
    """
    shards: dict[str, DTensor] = {}

    def without(node: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(node, DTensor):
            name = "/".join(map(str, path))
            shards[name] = node
            return {_PLACE: name, _OWNER: owner(path)}
        if isinstance(node, Mapping):
            return {key: without(value, (*path, key)) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(without(value, (*path, i)) for i, value in enumerate(node))
        return node

    return without(tree, ()), shards


def start_writing(folder: Path, shards: Shards, group: dist.ProcessGroup, *, background: bool) -> Future[None]:
    """Write the shards of all ranks into a new folder; every rank calls this. Done, they are on disk.

    group       of all ranks, on the CPU; used by nothing else until this is done
    background  copy the shards to main memory, return, and write from there
    """
    writer = _SummedWriter(folder)
    if background:
        return dcp.async_save(dict(shards), storage_writer=writer, process_group=group)  # type: ignore[return-value]
    done: Future[None] = Future()
    with _named_errors():
        dcp.save(dict(shards), storage_writer=writer, process_group=group)
    done.set_result(None)
    return done


def wait_for(writing: Future[None]) -> None:
    """Until `start_writing` is done. Raises what went wrong on any rank."""
    with _named_errors():
        writing.result()


def finish_writing(folder: Path, rest: Any) -> None:
    """On the first rank, when all shards are there: the rest, and the last checksums."""
    with (folder / REST).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    _write_sums(folder / _LAST, [folder / DCP_INDEX, folder / REST])


def read(folder: Path, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of a folder.

    own  this rank's parameters by name, to which shards come back split alike, every rank calling this; None: as whole
         tensors on the CPU, each process by itself
    """
    content, tensors = _with_room(folder, own, "cpu")
    with _named_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", READS_ALONE, UserWarning)
        dcp.load(tensors, storage_reader=_SafeReader(folder), no_dist=own is None)
    return content


def described(folder: Path) -> dict[str, Any]:
    """The content of a folder with tensors on the meta device in place of shards: their shapes, and no memory."""
    return _with_room(folder, None, "meta")[0]


def _with_room(folder: Path, own: Mapping[str, Any] | None, device: str) -> tuple[Any, dict[str, Tensor]]:
    """The content with empty tensors where the shards belong, and those by name."""
    sizes = _SafeReader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}

    def filled(node: Any) -> Any:
        if isinstance(node, Mapping):
            if _PLACE not in node:
                return {key: filled(value) for key, value in node.items()}
            name, kind = node[_PLACE], sizes[node[_PLACE]]
            assert isinstance(kind, TensorStorageMetadata)  # as `separated` puts no others there
            like = None if own is None else own.get(node[_OWNER])
            if isinstance(like, DTensor) and like.shape == kind.size:
                tensors[name] = torch.empty_like(like, dtype=kind.properties.dtype)
            else:
                tensors[name] = torch.empty(kind.size, dtype=kind.properties.dtype, device=device)
            return tensors[name]
        if isinstance(node, list | tuple):
            return type(node)(filled(value) for value in node)
        return node

    return filled(torch.load(folder / REST, map_location="cpu", weights_only=True)), tensors


@contextmanager
def _named_errors() -> Iterator[None]:
    """DCP raises the errors of all ranks in one BaseException; here comes the first of them by itself."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def damage_of_folder(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Reads all of it; raises OSError for what cannot be opened."""
    sums: dict[str, int] = {}
    try:
        for path in folder.glob("checksums*.json"):
            sums |= json.loads(path.read_text(encoding="utf-8"))
        if REST not in sums:
            return f"{_LAST} is missing"
        for name, expected in sorted(sums.items()):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _crc(folder / name) != expected:
                return f"the checksum of {name} differs"
        stored = {info.relative_path for info in _SafeReader(folder).read_metadata().storage_data.values()}
        torch.load(folder / REST, map_location="meta", weights_only=True)
    except (ValueError, pickle.UnpicklingError) as error:
        return f"cannot be understood: {str(error).splitlines()[0]}"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    missing = sorted(stored - sums.keys())
    return f"{missing[0]} has no checksum" if missing else None


class _SummedWriter(FileSystemWriter):
    """DCP's writer, which leaves the checksums of this rank's files beside them."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        future = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in future.wait()})
        folder = Path(self.path)
        _write_sums(folder / f"checksums-{self.rank}.json", [folder / name for name in names])
        return future


class _SafeReader(FileSystemReader):
    """DCP's reader, for which .metadata may hold data only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / DCP_INDEX).open("rb") as file:
            metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in DCP_INDEX_CLASSES:
            raise pickle.UnpicklingError(f"{DCP_INDEX} names {module}.{name}, which has no place there")
        return super().find_class(module, name)


def _write_sums(path: Path, files: list[Path]) -> None:
    with path.open("w", encoding="utf-8") as out:
        json.dump({file.name: _crc(file) for file in files}, out)
        out.flush()
        os.fsync(out.fileno())


def _crc(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total = zlib.crc32(piece, total)
    return total
