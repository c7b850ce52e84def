"""Two machines whose ranks and agents are killed by SIGKILL, three times, end with the bits of two that never were.

An agent of torchrun on each, on loopback; parameters and the sequence are split over the two ranks (fsdp_context).
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_forks import MOMENTS, Event, Job
from rank_runs import free_port, words

from lightsparse.training.checkpoints.files import checkpoint_path, read_checkpoint
from lightsparse.training.metrics.metrics_file import read_metrics

pytestmark = pytest.mark.multiprocess

STEPS = 12
TIMINGS = {"wall_s", "tokens_per_s", "flops_per_s", "dense_flops_per_s", "mfu"}
COMMON = (
    "strategy=fsdp_context",
    "data.batch_size=2",
    "optimizer=adamw",
    "checkpoint.every_n_steps=2",
    "eval.every_n_steps=3",
    f"trainer.max_steps={STEPS}",
    "~attention.window",
)
RUNS = {
    "block_sparse": (
        "attention=block_sparse",
        "attention.segment_lengths=[64]",
        "attention.dilation_rates=[2]",
        "attention.pattern.local.window=16",
        "attention.dropout=0.2",
        "trainer.accumulate_grad_batches=2",
    ),
    "adaptive": ("attention=adaptive", "attention.density=0.4"),
}


def job(folder: Path, name: str, variant: str, *events: Event) -> list[int | None]:
    """Both agents, started at once: their exit codes when nothing is left of them."""
    line = words(folder, f"name={name}", *COMMON, *RUNS[variant])
    where = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    agents = [
        Job(folder / f"log{node}", *line, torchrun=(*where, f"--node-rank={node}"), events=events) for node in range(2)
    ]
    return [agent.wait() for agent in agents]


def printed(folder: Path) -> str:
    return "\n".join((folder / f"log{node}").read_text() for node in range(2))


def left(folder: Path, name: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The rows of metrics.csv without what the clock decides, and the last checkpoint."""
    table = read_metrics(folder / "runs" / name / "metrics.csv")
    rows = [{key: value for key, value in row.items() if key not in TIMINGS} for row in table]
    return rows, read_checkpoint(checkpoint_path(folder / "runs" / name / "checkpoints", STEPS))


def drawn(chance: random.Random, kills: int) -> list[Event]:
    """Moments in random order, each once before one comes twice; ranks, agents and whole machines in turn."""
    events: list[Event] = []
    while len(events) < kills:
        for moment in chance.sample(MOMENTS, len(MOMENTS)):
            rank = 0 if moment == "checkpoint" else chance.randrange(2)  # the first rank writes
            to = ("self", "parent", "both")[len(events) % 3]
            # Late enough that most starts save something, so that the next one continues.
            events.append(Event(rank, moment, chance.randint(2, 4), signal.SIGKILL, to))
    return events[:kills]


def assert_same_bits(ours: Any, theirs: Any, where: str = "checkpoint") -> None:
    assert type(ours) is type(theirs), where
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same_bits(ours[key], value, f"{where} {key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            assert_same_bits(ours[i], value, f"{where} {i}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("variant", RUNS)
@pytest.mark.parametrize("kills", [3, pytest.param(14, marks=pytest.mark.slow)])
def test_two_machines_killed_anywhere_end_with_the_same_bits(kills: int, variant: str, tmp_path: Path) -> None:
    assert job(tmp_path, "whole", variant) == [0, 0], printed(tmp_path)
    done = 0
    for event in drawn(random.Random(f"{variant}{kills}"), kills):
        codes = job(tmp_path, "killed", variant, event)
        if codes == [0, 0]:  # it had come to the end before
            break
        done += 1
        killed = event.rank if event.to != "self" else None
        assert codes == [-signal.SIGKILL if node == killed else 1 for node in range(2)], (event, printed(tmp_path))
    assert done >= min(kills, 3)
    assert job(tmp_path, "killed", variant) == [0, 0], printed(tmp_path)
    rows, ours = left(tmp_path, "killed")
    wanted, theirs = left(tmp_path, "whole")
    assert rows == wanted
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "DataModule", "validation", "global_step"):
        assert_same_bits(ours[part], theirs[part], part)
    assert_same_bits(ours.get("choices"), theirs.get("choices"), "choices")
