"""Jobs of several ranks in the time that their training takes: every process is forked from one that has imported all.

    job = Job(tmp_path / "log", *words(...))                        # `python train.py …`
    job = Job(log, *words(...), torchrun=("--nproc-per-node=2",))   # `torchrun … train.py …`
    assert job.wait() == 75 and job.codes == {1: 75}

Our launcher and torchrun's agents run as they are, up to `subprocess.Popen`, which forks where it would start
Python again. What a rank does is `train.py`'s own `main`, without its plots. Signals are sent by the ranks themselves,
in the moments that `events` name.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rank_runs import environment

_FORKS = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Event:
    """In its `count`-th such moment of an attempt, `rank` sends a signal.

    to  self; parent (who started it: an agent, or the first rank); both of them; group (all of its process group)
    """

    rank: int
    moment: str  # one of MOMENTS
    count: int
    number: signal.Signals
    to: str = "self"
    attempt: int = 0  # of torchrun's agent


class Job:
    """A command as a process that leads a group and a session.

    log       file for what all its processes print
    torchrun  options of torchrun, for a command that it starts; None = the command starts its ranks by itself
    """

    def __init__(
        self, log: Path, *line: str, torchrun: Sequence[str] | None = None, events: Sequence[Event] = (), **more: str
    ) -> None:
        self.log, self._codes = log, log.with_name(log.name + ".codes")
        self._codes.unlink(missing_ok=True)
        self.process = _FORKS.Process(
            target=_job, args=(log, list(line), torchrun, list(events), environment(**more), list(sys.path))
        )
        self.process.start()

    @property
    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that the job's first process has started, by rank on its machine; newest attempt."""
        lines = self._codes.read_text().splitlines() if self._codes.exists() else []
        return {int(rank): int(code) for rank, code in (line.split() for line in lines)}

    def wait(self, seconds: float = 120.0) -> int | None:
        """The exit code, as the shell's where no signal ended it; asserts that no process is left soon afterwards."""
        try:
            self.process.join(seconds)
            code = self.process.exitcode
            assert code is not None, f"has not ended in {seconds:g} s:\n{self.log.read_text()}"
            until = time.monotonic() + 20
            while left := self._members():
                assert time.monotonic() < until, f"{left} are left:\n{self.log.read_text()}"
                time.sleep(0.02)
        finally:
            for member in self._members():
                member.kill()
        return code

    def _members(self) -> list[psutil.Process]:
        """The job's processes: they alone have its log open, torchrun's ranks with sessions of their own included."""
        found = []
        for process in psutil.process_iter(["status"]):
            try:
                if process.info["status"] != psutil.STATUS_ZOMBIE and os.path.samefile(
                    f"/proc/{process.pid}/fd/1", self.log
                ):
                    found.append(process)
            except OSError:
                continue
        return found


# ---- in the processes of a job ----------------------------------------------------------------------------------


class _Fork:
    """What a launcher needs of subprocess.Popen, for a rank that is forked from it."""

    events: list[Event]
    codes: Path

    def __init__(
        self,
        args: Sequence[str],
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = False,
    ) -> None:
        script = next(i for i, word in enumerate(args) if word.endswith("train.py"))
        self.args, self.returncode = args, None
        self.rank = int((env or {}).get("LOCAL_RANK", 0))
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            os.environ.clear()
            os.environ.update(env or {})
            _as_program(lambda: _rank(list(args[script:]), _Fork.events))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                with _Fork.codes.open("a") as file:
                    file.write(f"{self.rank} {self.returncode}\n")
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() >= until:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _job(
    log: Path,
    line: list[str],
    torchrun: Sequence[str] | None,
    events: list[Event],
    variables: dict[str, str],
    path: list[str],
) -> None:
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:] = path
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from lightsparse.distributed import launcher

    _Fork.events, _Fork.codes = events, log.with_name(log.name + ".codes")
    launcher.Popen = _Fork  # type: ignore[misc, assignment]
    subprocess_handler.Popen = _Fork  # type: ignore[misc, assignment]
    if torchrun is None:
        sys.orig_argv = [sys.executable, "train.py", *line]
        _as_program(lambda: _rank(["train.py", *line], events))
    from torch.distributed import run

    sys.argv = ["torchrun"]
    _as_program(lambda: run.main([*torchrun, "train.py", *line]))


def _as_program(main: Callable[[], None]) -> None:
    """Run `main` and end the process as Python would."""
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(arguments: list[str], events: list[Event]) -> None:
    """`train.py` as one rank."""
    import torch
    from hydra.core.global_hydra import GlobalHydra

    from lightsparse.cli import train
    from lightsparse.training import run

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # as a new program's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    GlobalHydra.instance().clear()
    sys.argv = arguments
    torch.set_num_threads(1)
    run.draw_plots = lambda *given: None  # type: ignore[assignment]
    run.matmul_peak = lambda *given: 1e11  # type: ignore[assignment]
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    for event in events:
        if (event.rank, event.attempt) == (rank, attempt):
            _arm(event)
    train.main()


def _arm(event: Event) -> None:
    """Change the program so that the event happens in its moment, and not in that of a rank forked from this one."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.data import DataLoader

    from lightsparse.data.module import DataModule
    from lightsparse.distributed.strategies import GridStrategy
    from lightsparse.training import run
    from lightsparse.training.module import LanguageModel

    here = os.getpid()

    def happen() -> None:
        if os.getpid() == here:
            _happen(event)

    owners: dict[str, tuple[Any, str]] = {
        "data": (DataModule, "setup"),  # before this rank has met another
        "meeting": (GridStrategy, "_meet"),
        "starting": (Trainer, "_run_stage"),  # Lightning has put in its handlers, and we have not
        "forward": (LanguageModel, "training_step"),
        "backward": (LanguageModel, "backward"),
        "optimizer": (LanguageModel, "optimizer_step"),
        "validation": (LanguageModel, "validation_step"),
        "gathering": (LanguageModel, "on_save_checkpoint"),
        "ending": (run, "summarize"),
    }
    if event.moment == "loading":
        DataLoader.__iter__ = _batches(DataLoader.__iter__, event.count, happen)  # type: ignore[method-assign]
    elif event.moment == "checkpoint":
        _half_written(event.count, happen)
    elif event.moment == "agreeing":
        DDPStrategy.reduce = _agreeing(DDPStrategy.reduce, event.count, happen)  # type: ignore[method-assign]
    else:
        owner, name = owners[event.moment]
        setattr(owner, name, _before(getattr(owner, name), event.count, happen))


MOMENTS = ("loading", "forward", "backward", "optimizer", "validation", "gathering", "checkpoint")  # inside training


def _happen(event: Event) -> None:
    targets = {"self": (os.getpid(),), "parent": (os.getppid(),), "both": (os.getppid(), os.getpid()), "group": (0,)}
    for target in targets[event.to]:
        os.kill(target, event.number)
    if event.to == "parent" and event.number == signal.SIGKILL:
        time.sleep(60)  # the rank's own end must come in this very moment


def _before(function: Callable[..., Any], count: int, happen: Callable[[], None]) -> Callable[..., Any]:
    """The function, before whose `count`-th call it happens."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            happen()
        return function(*args, **kwargs)

    return counted


def _agreeing(reduce: Callable[..., Any], count: int, happen: Callable[[], None]) -> Callable[..., Any]:
    """DDPStrategy.reduce, in whose `count`-th maximum, as the ranks agree whether to stop, it happens."""
    calls = 0

    def counted(self: Any, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        nonlocal calls
        result = reduce(self, tensor, group, reduce_op)
        calls += reduce_op == "max"
        if reduce_op == "max" and calls == count:
            happen()
        return result

    return counted


def _batches(batches: Callable[..., Any], count: int, happen: Callable[[], None]) -> Callable[..., Any]:
    def iterated(loader: Any) -> Any:
        for number, batch in enumerate(batches(loader), start=1):
            if number == count:
                happen()
            yield batch

    return iterated


def _half_written(count: int, happen: Callable[[], None]) -> None:
    """torch.save, in whose `count`-th call it happens when half of the file is written."""
    import torch

    save, calls = torch.save, 0

    def counted(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != count:
            return save(content, file, *args, **kwargs)
        whole = io.BytesIO()
        save(content, whole, *args, **kwargs)
        half = len(whole.getvalue()) // 2
        file.write(whole.getvalue()[:half])
        file.flush()
        happen()
        file.write(whole.getvalue()[half:])

    torch.save = counted
