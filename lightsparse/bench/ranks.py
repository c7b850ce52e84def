"""A function on several ranks, each a fresh process over gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(minutes=10)


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(rank, world, *args) returns on each rank. The default process group is there when it starts.

    Raises what a rank raised, or concurrent.futures.process.BrokenProcessPool when one was killed.
    """
    with tempfile.TemporaryDirectory(prefix="lightsparse-") as folder:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=world, mp_context=spawn) as pool:
            runs = [pool.submit(_on_rank, folder, rank, world, function, args) for rank in range(world)]
            return [run.result() for run in runs]


def _on_rank(folder: str, rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=_TIMEOUT, rank=rank, world_size=world)
    try:
        return function(rank, world, *args)
    finally:
        dist.destroy_process_group()
