"""`bench checkpoint`: what saving costs a training step, in the step's way and beside it.

The model of `bench train` takes steps; before each, its weights and optimizer state are saved, flushed to disk and
named by the writer that runs use. The last save of a round is waited for within the round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightsparse.bench import options
from lightsparse.bench.contenders import Contender, Setup
from lightsparse.bench.report import Report
from lightsparse.bench.timing import alternate, runtime
from lightsparse.bench.verify import VerificationError
from lightsparse.training.checkpoints.background_writer import CheckpointWriter
from lightsparse.training.checkpoints.files import read_checkpoint
from lightsparse.utils.compat.torch import tree_leaves
from lightsparse.utils.machine import MIB

EXAMPLE = "lightsparse bench checkpoint --context 2048 --threads 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=options.count, default=2048, metavar="N", help="tokens of a step (2048)")
    parser.add_argument("--steps", type=options.count, default=4, metavar="S", help="steps and saves of a round (4)")
    parser.add_argument("--repeats", type=options.count, default=5, metavar="R", help="timed rounds of each (5)")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options.add_runtime(parser, threads=1)
    options.add_json(parser)


def measure(args: argparse.Namespace, report: Report) -> None:
    """A row per way of saving. Raises VerificationError where what was written is not the state at its step."""
    setup = Setup(args.context, 0.5, 128, "fp32", "adamw", args.threads, args.matmul_precision)
    with runtime(args.threads, args.matmul_precision), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        contender = Contender("lightsparse", setup)
        contender.step()  # allocates the optimizer's state
        path = Path(folder, "step.ckpt")
        writers: dict[str, CheckpointWriter | None] = {
            "none": None,
            "synchronous": CheckpointWriter(False, 600),
            "background": CheckpointWriter(True, 600),
        }

        stalled: dict[CheckpointWriter | None, float] = dict.fromkeys(writers.values(), 0.0)  # seconds

        def rounds(writer: CheckpointWriter | None) -> None:
            for _ in range(args.steps):
                if writer is not None:
                    started = time.perf_counter()
                    writer.save_checkpoint(_content(contender), path)
                    stalled[writer] += time.perf_counter() - started
                contender.step()
            if writer is not None:
                writer.finish()

        for writer in writers.values():
            if writer is not None:
                _verify(contender, writer, path)
        laps = alternate({name: partial(rounds, writer) for name, writer in writers.items()}, args.repeats)
        state = sum(leaf.nbytes for leaf in tree_leaves(_content(contender)) if isinstance(leaf, Tensor))
        for name, writer in writers.items():
            ratios = [lap.wall / bare.wall for lap, bare in zip(laps[name], laps["none"], strict=True)]
            work = [lap.cpu / bare.cpu for lap, bare in zip(laps[name], laps["none"], strict=True)]
            saves = args.steps * (args.repeats + 1)
            report.rows.append(
                {
                    "saving": name,
                    "context": args.context,
                    "threads": args.threads,
                    "state_mib": state / MIB,
                    "ms_per_step": statistics.median(lap.wall for lap in laps[name]) / args.steps * 1e3,
                    "cost": statistics.median(ratios) - 1,
                    "cpu_cost": statistics.median(work) - 1,
                    "stall_ms": stalled[writer] / saves * 1e3,
                    "repeats": args.repeats,
                }
            )
    report.notes.append(
        f"A save before every step, {args.steps} steps a round, {args.repeats} rounds in turns; cost is the median "
        "over rounds of a step's time over that without saving in the same round, minus 1; cpu_cost the same in CPU "
        "time of all threads; stall_ms what a step waits for a save (of the whole write, or of the copy)."
    )


def _content(contender: Contender) -> dict[str, Any]:
    return {"state_dict": contender.model.state_dict(), "optimizer_states": [contender.optimizer.state_dict()]}


def _verify(contender: Contender, writer: CheckpointWriter, path: Path) -> None:
    """Save, train on, and compare the file with the state at the save."""
    expected = [leaf.clone() for leaf in tree_leaves(_content(contender)) if isinstance(leaf, Tensor)]
    writer.save_checkpoint(_content(contender), path)
    contender.step()
    writer.finish()
    found = [leaf for leaf in tree_leaves(read_checkpoint(path)) if isinstance(leaf, Tensor)]
    if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
        raise VerificationError(f"{path} does not hold the state at its step")
