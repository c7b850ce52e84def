"""Whole training runs over several ranks: inside a RankPool, or as processes that a launcher starts.

Both take the words of a command line. The text and the tiny model are those that tests/training uses.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

# Workers of a pool start with all that a run imports, where no other pool has been started before.
multiprocessing.set_forkserver_preload(
    [
        *("torch", "torch.distributed.run", "torch.nn.parallel", "matplotlib.pyplot"),
        *("lightsparse.cli.work.train", "lightsparse.data.files"),
    ]
)

ROOT = Path(__file__).parents[1]
TINY = (
    "precision=32",
    "data=files",
    "model=nano",
    "model.depth=2",
    "model.embed_dim=32",
    "model.heads=2",
    "model.head_dim=16",
    "attention=sliding_window",
    "attention.window=40",
    "attention.block=16",
    "model.layer_pattern=SD",
    "data.context=256",
    "schedule.warmup_steps=5",
    "eval.tokens=1024",
    "eval.every_n_steps=10",
    "eval.sample_tokens=0",
    "trainer.max_steps=20",
    "trainer.progress=false",
    "trainer.log_every_n_steps=1",
    "threads=1",
)


def words(folder: Path, *more: str) -> list[str]:
    """The command line of a tiny run below `folder`, its text included.

    more  words that go before those of TINY for the same key; `~key` leaves the key out
    """
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir(parents=True)
        for i in range(40):
            text = " ".join(f"{i * j % 17} times {j} is {i * j}," for j in range(i % 7 + 3, 60))
            (texts / f"{i:02}.txt").write_text(f"Document {i}. {text} and so on.\n", encoding="utf-8")
    given = {word.lstrip("~").partition("=")[0] for word in more}
    kept = [word for word in TINY if word.partition("=")[0] not in given]
    own = [f"data.path={texts}/*.txt", f"runs_dir={folder / 'runs'}"]
    return [*kept, *own, *(word for word in more if not word.startswith("~"))]


def fitted(rank: int, world: int, line: list[str]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The run of a command line as one rank of a pool: its summary, and the rows of metrics.csv."""
    from lightsparse.config.compose import compose_raw
    from lightsparse.config.parse import on_this_machine, parse
    from lightsparse.training import run
    from lightsparse.training.metrics.metrics_file import read_metrics
    from lightsparse.training.preflight.check import check

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
        TORCHELASTIC_RUN_ID="pool",
        OMP_NUM_THREADS="1",
    )
    run.draw_plots = lambda *given: None  # longer than the training
    run.matmul_peak = lambda *given: 1e11
    config = parse(on_this_machine(compose_raw(line)))
    check(config)
    summary = run.fit(config)
    return summary, read_metrics(Path(config.runs_dir) / config.name / "metrics.csv")


def members(rank: int, world: int) -> tuple[list[int], float, float]:
    """In a grid of two ranks per sequence: those of this one's, the sum of their numbers, and of everybody's."""
    import torch
    import torch.distributed as dist

    from lightsparse.distributed.mesh import RankGrid

    grid = RankGrid(world, 2)
    group = grid.context_group(timedelta(seconds=1))
    ours, all_of_them = torch.tensor(float(rank)), torch.tensor(float(rank))
    dist.all_reduce(ours, group=group)
    dist.all_reduce(all_of_them, group=grid.flat_mesh("cpu").get_group())
    return dist.get_process_group_ranks(group), float(ours), float(all_of_them)


def environment(**more: str) -> dict[str, str]:
    """For processes of their own: one thread each, this clone's package, nothing of a launcher around the tests."""
    launchers = (
        "LIGHTSPARSE_LAUNCHER",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "NODE_RANK",
        "GROUP_RANK",
        "MASTER_ADDR",
    )
    kept = {name: value for name, value in os.environ.items() if name not in (*launchers, "MASTER_PORT")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", **more}


def command(line: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *line]


def torchrun(line: list[str], *options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *line]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks_of(marker: str) -> list[psutil.Process]:
    """The living processes whose command line holds `marker`, the name of the run, oldest first."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and marker in (process.info["cmdline"] or []):
            found.append(process)
    return sorted(found, key=lambda process: process.info["create_time"])
