"""A function on R gloo ranks at once, each a process of its own with one thread.

    pool = pool_fixture(4)                     # at the top of a test module

    @pytest.mark.multiprocess
    def test_ranks_agree(pool):
        a, b, c, d = pool.run(function, 3)     # function(rank, world, 3), at the top of a module, on every rank

The default process group is there when the function starts. Workers live as long as the pool and are forked from a
server that has imported torch once, so that a pool starts in a moment. After a failure the workers are ended, and the
next run starts new ones: ranks that have lost their step are of no use to the next test.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist

_FORKS = multiprocessing.get_context("forkserver")
# torch._dynamo is what makes the first DDP module, or the import of our kernels, take seconds.
_FORKS.set_forkserver_preload(["pytest", "torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo"])
_START = 300.0  # seconds that ranks have to find one another: on a machine full of others, imports alone take a minute
_GRACE = 2.0  # seconds that the other ranks have to answer after one has failed, so that their errors are shown, too


class RankFailureError(AssertionError):
    """A rank raised, ended or did not answer; the message holds the traceback of each."""


class RankPool:
    """`world` ranks that run functions together, one after the other.

    timeout  seconds a run may take, the start of the ranks aside; beyond it, the stack of every silent rank is shown
    """

    def __init__(self, world: int, timeout: float = 60.0):
        self.world, self.timeout = world, timeout
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: dist.TCPStore | None = None

    def run(self, function: Callable[..., Any], *args: Any, dies: Collection[int] = ()) -> list[Any]:
        """What function(rank, world, *args) returned on each rank; for ranks named in `dies`, which may end: None.

        Raises RankFailureError with the ranks' tracebacks when one raised, ended or did not answer in time.
        """
        task = pickle.dumps((function, args))
        ended: set[int] = set()
        good = False
        try:
            if not self._workers:
                self._start()
            for pipe in self._pipes:
                pipe.send((list(sys.path), task))
            results, failures = self._answers(self.timeout, set(dies), ended)
            good = not failures and not ended
        finally:  # an answer that nobody took would be taken for that of the next run
            if not good:
                self.close()
        if failures:
            raise RankFailureError("\n".join(f"rank {rank} {text}" for rank, text in sorted(failures.items())))
        return results

    def _answers(self, seconds: float, dies: set[int], ended: set[int]) -> tuple[list[Any], dict[int, str]]:
        """The results, and what went wrong by rank; ranks that ended are put into `ended`."""
        results: list[Any] = [None] * self.world
        failures: dict[int, str] = {}
        silent = set(range(self.world))
        until = time.monotonic() + seconds
        while silent and (ready := wait([self._pipes[rank] for rank in silent], max(0.0, until - time.monotonic()))):
            for rank in [rank for rank in silent if self._pipes[rank] in ready]:
                silent.remove(rank)
                try:
                    good, answer = self._pipes[rank].recv()
                except (EOFError, ConnectionError):
                    ended.add(rank)
                    if rank in dies:
                        continue
                    self._workers[rank].join(_GRACE)
                    good, answer = False, f"ended with exit code {self._workers[rank].exitcode}"
                if good:
                    results[rank] = pickle.loads(answer)
                else:
                    failures[rank] = answer
                    until = min(until, time.monotonic() + _GRACE)
        late = f"{_GRACE:g} s of another's failure" if failures else f"{seconds:g} s"
        for rank in silent:
            failures[rank] = f"did not answer within {late}; it is here:\n{self._stack(rank)}"
        return results, failures

    def close(self) -> None:
        """End all workers; the next run starts new ones."""
        for pipe in self._pipes:
            pipe.close()  # a worker that waits for its next task ends by itself
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._workers, self._pipes, self._folder, self._store = [], [], None, None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        # Held here, so that it outlives every rank as a launcher's does.
        self._store = dist.TCPStore("127.0.0.1", 0, self.world, is_master=True, wait_for_workers=False)
        for rank in range(self.world):
            ours, theirs = _FORKS.Pipe()
            arguments = (theirs, self._folder.name, self._store.port, rank, self.world, self.timeout)
            worker = _FORKS.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            theirs.close()  # else the end of a worker would not end the pipe
            self._workers.append(worker)
            self._pipes.append(ours)
        _, failures = self._answers(_START, set(), set())
        if failures:
            raise RankFailureError("\n".join(f"rank {rank} {text}" for rank, text in sorted(failures.items())))

    def _stack(self, rank: int) -> str:
        """Where a silent rank is."""
        assert self._folder is not None
        os.kill(self._workers[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        file = Path(self._folder.name, f"stack{rank}")
        return file.read_text() if file.exists() else "it has not started"


def _work(pipe: Connection, folder: str, port: int, rank: int, world: int, seconds: float) -> None:
    """A worker: run the functions that come through the pipe until it closes."""
    with Path(folder, f"stack{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        torch.set_num_threads(1)
        pipe.send(_attempt(lambda: _join(port, rank, world, seconds)))
        while True:
            try:
                path, task = pipe.recv()
            except EOFError:
                return
            sys.path[:] = path
            pipe.send(_attempt(lambda task=task: _call(task, rank, world)))


def _attempt(call: Callable[[], Any]) -> tuple[bool, Any]:
    """(True, its pickled result), or (False, its traceback)."""
    try:
        return True, pickle.dumps(call())
    except BaseException:  # whatever it was, the parent shows it
        return False, "raised\n" + traceback.format_exc()


def _call(task: bytes, rank: int, world: int) -> Any:
    function, args = pickle.loads(task)
    torch.manual_seed(0)
    return function(rank, world, *args)


def _join(port: int, rank: int, world: int, seconds: float) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not have an address
    timeout, start = timedelta(seconds=seconds), timedelta(seconds=_START)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False, timeout=start)
    store.set(f"here{rank}", "")
    store.wait(
        [f"here{other}" for other in range(world)], start
    )  # from here on all are there, and the usual time is enough
    store.set_timeout(timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def pool_fixture(world: int, timeout: float = 60.0) -> Any:
    """A fixture for a whole module: one pool, ended after the module's last test."""

    @pytest.fixture(scope="module")
    def pool() -> Iterator[RankPool]:
        with RankPool(world, timeout) as ranks:
            yield ranks

    return pool
