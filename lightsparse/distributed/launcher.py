"""The ranks of this machine: started as this process was, and ended together, by a watch over the family.

A rank notices the end of another one in their next collective. Before the first collective, between two that lie far
apart, and where a stopped process can't notice anything, only the family tree of the processes is left to look at.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from subprocess import Popen, TimeoutExpired
from typing import Any

import psutil
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment

from lightsparse.distributed.environment import OWN
from lightsparse.utils.compat.lightning import Launcher
from lightsparse.utils.compat.torch import TORCHRUN_ID
from lightsparse.utils.machine import usable_cores
from lightsparse.utils.rank_errors import EXIT_CODE

_POLL, _GRACE = 0.5, 5.0  # seconds between looks; seconds that a process has to end by itself, with its own words
_AGREED = 30.0  # the same, where the ranks have agreed to end; torchrun gives as much


class RankLauncher(Launcher):
    """Starts ranks 1, 2, … of this machine unless torchrun or SLURM has; no rank outlives the others by long.

    ranks     what Lightning knows of the job's processes
    here      ranks on this machine
    machines  of the job
    handed    variables for the ranks that it starts
    """

    is_interactive_compatible = False  # a notebook's command line starts no second rank

    def __init__(self, ranks: ClusterEnvironment, here: int, machines: int, handed: Mapping[str, str]) -> None:
        self._ranks, self._here, self._machines, self._handed = ranks, here, machines, handed
        self._children: list[Popen] = []
        self._watch: _Watch | None = None

    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self._ranks.validate_settings(num_devices=self._here, num_nodes=self._machines)
        if "OMP_NUM_THREADS" not in os.environ:  # else every rank would take all cores
            os.environ["OMP_NUM_THREADS"] = str(max(usable_cores() // self._here, 1))
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if not self._ranks.creates_processes_externally:
            self._start_others()
        self._watch = watch = _Watch(self._children)
        watch.start()
        result = function(*args, **kwargs)
        watch.stop()  # not after an error: that must end, too
        return result

    def kill(self, signum: int) -> None:
        """Lightning's handler of SIGTERM, where ours is not in place yet, hands the signal on."""
        for child in self._children:
            child.send_signal(signum)

    def _start_others(self) -> None:
        """This very command once more for each, whether it was `python train.py …` or `lightsparse train …`.

        Lightning's own launcher would make it up from sys.argv, which has lost the verb.
        """
        os.environ |= {
            OWN: str(os.getpid()),
            "MASTER_ADDR": self._ranks.main_address,
            "MASTER_PORT": str(self._ranks.main_port),
            "NODE_RANK": str(self._ranks.node_rank()),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self._here * self._machines),
        }
        command = [sys.executable, *sys.orig_argv[1:]]
        for local_rank in range(1, self._here):
            env = os.environ | self._handed | {"LOCAL_RANK": str(local_rank)}
            self._children.append(Popen(command, env=env))

    def expect_end(self) -> None:
        """The ranks have agreed to end: that one has done so before this one has written everything is no loss."""
        assert self._watch is not None  # there are ranks only inside `launch`
        self._watch.expected = EXIT_CODE

    def end_family(self, at_once: bool = False) -> None:
        """After an error that ends this rank: end what it started, and a stopped process that started it."""
        agreed = self._watch is not None and self._watch.expected
        _end(self._children, 0.0 if at_once else _AGREED if agreed else _GRACE)
        parent = _launching_parent()
        if parent is not None and os.getppid() == parent and psutil.Process(parent).status() == psutil.STATUS_STOPPED:
            os.kill(parent, signal.SIGKILL)  # nobody else could; it has lost this rank already


class _Watch(threading.Thread):
    """Ends this process when one that it started has failed, or the one that started it is gone."""

    def __init__(self, children: list[Popen]) -> None:
        super().__init__(daemon=True, name="rank-watch")
        self._children = children
        self._parent = _launching_parent()
        if self._parent is None and TORCHRUN_ID in os.environ:  # torchrun's agent
            self._parent = os.getppid()
        self._stopped = threading.Event()
        self.expected = 0  # the code, beside 0, with which a rank may end

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.wait(_POLL):
            lost = self._lost()
            if lost and not self._stopped.wait(_GRACE):
                _end(self._children)
                sys.stderr.write(f"{lost}; the same command continues from the last checkpoint\n")
                sys.stderr.flush()
                os._exit(EXIT_CODE)  # the main thread may wait in a collective, where no exception reaches it

    def _lost(self) -> str | None:
        for local_rank, child in enumerate(self._children, start=1):
            if child.poll() not in (None, 0, self.expected):
                return f"rank {local_rank} of this machine has ended with code {child.returncode}"
        if self._parent is not None and os.getppid() != self._parent:
            return f"process {self._parent}, which started this rank, has ended"
        return None


def _launching_parent() -> int | None:
    """The rank that started this one, or None where it was torchrun, SLURM or a user."""
    parent = int(os.environ.get(OWN, 0))
    return parent if parent not in (0, os.getpid()) else None


def _end(children: list[Popen], seconds: float = _GRACE) -> None:
    """Wait so long for each, then kill those that are left: a stopped process takes no other signal."""
    for child in children:
        try:
            child.wait(seconds)
        except TimeoutExpired:
            child.kill()
            child.wait()
