"""A run killed by SIGKILL anywhere, any number of times, ends with the bits of one that was never touched.

Every start is a process of its own, forked from a server that has imported everything, and dies in a named moment.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightsparse.config.schema import Config
from lightsparse.training import run
from lightsparse.training.checkpoints.files import checkpoint_path, read_checkpoint
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.module import LanguageModel

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(  # the last module to set it decides for all: jobs of several ranks fork from it, too
    ["torch.distributed.run", "lightsparse.cli.work.train", "lightsparse.data.files", "matplotlib.pyplot"]
)

pytestmark = pytest.mark.multiprocess

TIMINGS = {"wall_s", "tokens_per_s", "flops_per_s", "dense_flops_per_s", "mfu"}
RUNS = {
    "dense": ("attention=dense",),
    "block_sparse": (
        "attention=block_sparse",
        "attention.block=16",
        "attention.segment_lengths=[32]",
        "attention.dilation_rates=[2]",
        "attention.pattern.local.window=16",
        "attention.dropout=0.2",
        "trainer.accumulate_grad_batches=2",
    ),
    "adaptive": ("attention=adaptive", "attention.block=16", "attention.density=0.3", "optimizer=muon"),
}
MOMENTS = ("loading", "forward", "backward", "optimizer", "validation", "checkpoint", "metrics", "any time")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The function, whose `count`-th call kills the process as it starts."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            _die()
        return function(*args, **kwargs)

    return counted


def _start(config: Config, moment: str | None, count: int) -> None:
    """In a process of its own: the run, killed in the `count`-th such moment of this start."""
    torch.set_num_threads(1)
    run.draw_plots = lambda *given: None  # type: ignore[assignment]
    run.matmul_peak = lambda *given: 1e11  # type: ignore[assignment]
    if moment == "loading":
        DataLoader.__iter__ = _killing_batches(DataLoader.__iter__, count)  # type: ignore[method-assign]
    elif moment == "forward":
        LanguageModel._forward = _dying(LanguageModel._forward, count)  # type: ignore[method-assign]
    elif moment == "backward":
        LanguageModel.backward = _dying(LanguageModel.backward, count)  # type: ignore[method-assign]
    elif moment == "optimizer":
        torch.optim.AdamW.step = _dying(torch.optim.AdamW.step, count)  # type: ignore[method-assign]
    elif moment == "validation":
        LanguageModel.validation_step = _dying(LanguageModel.validation_step, count)  # type: ignore[method-assign]
    elif moment == "checkpoint":
        torch.save = _half_written(torch.save, count)
    elif moment == "metrics":
        os.fsync = _dying(os.fsync, count)
    elif moment == "any time":
        signal.signal(signal.SIGALRM, lambda *given: _die())
        signal.setitimer(signal.ITIMER_REAL, 0.05 * count)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        run.fit(config)


def _killing_batches(batches: Callable[..., Any], count: int) -> Callable[..., Any]:
    def iterated(loader: DataLoader) -> Any:
        for number, batch in enumerate(batches(loader), start=1):
            if number == count:
                _die()
            yield batch

    return iterated


def _half_written(save: Callable[..., Any], count: int) -> Callable[..., Any]:
    """torch.save, which dies in its `count`-th call when half of the file is written."""
    calls = 0

    def counted(content: Any, file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls < count:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        return _die()

    return counted


def _run(config: Config, moment: str | None = None, count: int = 1) -> bool:
    """Whether the run was killed; it has finished otherwise."""
    process = _FORKS.Process(target=_start, args=(config, moment, count))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode} after {moment} {count}"
    return process.exitcode != 0


def _rows(config: Config) -> list[dict[str, float]]:
    table = read_metrics(Path(config.runs_dir, config.name, "metrics.csv"))
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in table]


@pytest.mark.parametrize("variant", RUNS)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_ends_with_the_same_bits(kills: int, variant: str, tiny: Callable[..., Config]) -> None:
    last = 5 * kills  # a start that is killed takes about four steps
    words = (*RUNS[variant], "checkpoint.every_n_steps=2", "eval.every_n_steps=3", f"trainer.max_steps={last}")
    whole = tiny("name=whole", *words)
    assert not _run(whole)
    config = tiny("name=killed", *words)
    chance, done = random.Random(f"{variant}{kills}"), 0
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(kills)]
    chance.shuffle(moments)
    for moment in moments:
        # Late enough that most starts save something, so that the next one continues.
        done += _run(config, moment, chance.randint(2, 9))
    assert done >= 0.9 * kills  # a run that had finished can be killed no more
    assert not _run(config)
    assert _rows(config) == _rows(whole)
    one, two = (
        read_checkpoint(checkpoint_path(Path(c.runs_dir, c.name, "checkpoints"), last)) for c in (whole, config)
    )
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    for key in ("DataModule", "lr_schedulers", "global_step", "validation"):
        assert one[key] == two[key], key
