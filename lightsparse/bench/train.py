"""`bench train`: whole training steps (forward, loss, backward, optimizer) of one shape in three implementations.

4 layers, d 512, 8 heads × 64, 2 key/value heads, MLP 1408, vocabulary 256, batch 1: our decoder with block-sparse and
with dense attention, and a transformers Llama with SDPA where the extra `hf` is installed, all from the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from dataclasses import asdict

import psutil
import torch

from lightsparse.bench import options
from lightsparse.bench.contenders import OPTIMIZERS, Contender, Setup, installed
from lightsparse.bench.machine import MIB, in_child, peak_rss, usable_cores
from lightsparse.bench.report import Report
from lightsparse.bench.timing import Lap, alternate, runtime, speedup
from lightsparse.bench.verify import VerificationError

log = logging.getLogger(__name__)

EXAMPLE = "python -m lightsparse.bench train --context 2048,16384 --density 0.1 --dtype fp32 --threads 2"

# The relative difference between two dense models of the same weights that is still rounding.
ROUNDING = {"fp32": 1e-4, "bf16": 1e-2}
SPARE_MEMORY = 0.8  # share of the free memory that contenders may fill together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_list(parser, "--context", options.count, [2048, 16384], "tokens per sample; the batch is one sample")
    options.add_list(parser, "--density", float, [0.1], "shares of dense tiles of the sparse model, at most")
    parser.add_argument("--block", type=options.count, default=128, metavar="B", help="tokens per block (128)")
    options.add_list(parser, "--dtype", options.dtype, ["fp32"], "fp32, bf16 (autocast over fp32 parameters)")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="the same for all (adamw)")
    options.add_runtime(parser, threads=usable_cores())
    parser.add_argument("--repeats", type=options.count, default=3, metavar="R", help="timed steps of each model (3)")
    options.add_json(parser)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Fill the report with a row per model and setting.

    Raises VerificationError when the dense model's loss differs from that of transformers with the same weights.
    """
    names = installed()
    report.notes.append(
        "One step = forward, mean cross-entropy over all tokens, backward, optimizer; the same weights, tokens, "
        f"dtype, optimizer and matmul precision ({args.matmul_precision!r}) for all; ms_per_step is a median of "
        f"{args.repeats}. loss is that before the first step. peak_rss_mib: a whole process with this model alone, "
        "imports included."
    )
    if "transformers" not in names:
        report.notes.append("transformers is not installed and left out; pip install 'lightsparse[hf]' adds it.")
    for dtype, context, density in itertools.product(args.dtype, args.context, args.density):
        setup = Setup(context, density, args.block, dtype, args.optimizer, args.threads, args.matmul_precision)
        log.info("%s, %s tokens: memory, a process per model", dtype, f"{context:,}")
        peaks = {name: in_child(peak_of_steps, name, setup) for name in names}
        together = sum(peaks.values()) < SPARE_MEMORY * psutil.virtual_memory().available
        log.info("%s, %s tokens: time, %s", dtype, f"{context:,}", "in turns" if together else "one after the other")
        if not together:
            report.notes.append(f"At {context} tokens the models do not fit together; they ran one after the other.")
        groups = [names] if together else [(name,) for name in names]
        laps: dict[str, list[Lap]] = {}
        losses: dict[str, float] = {}
        densities: dict[str, float] = {}
        for group in groups:
            _time(group, setup, args.repeats, laps, losses, densities)
        _verify(losses, dtype)
        for name in names:
            seconds = statistics.median(lap.wall for lap in laps[name])
            report.rows.append(
                {
                    "model": name,
                    **asdict(setup),
                    "density": densities[name],
                    "ms_per_step": seconds * 1e3,
                    "tokens_per_s": context / seconds,
                    "vs_transformers": speedup(laps[name], laps["transformers"]) if "transformers" in names else None,
                    "peak_rss_mib": peaks[name] / MIB,
                    "loss": losses[name],
                    "alternated": together,
                    "repeats": args.repeats,
                }
            )


def peak_of_steps(name: str, setup: Setup) -> int:
    """Peak resident memory of two training steps, bytes. Meant for a fresh process."""
    with runtime(setup.threads, setup.matmul_precision):
        contender = Contender(name, setup)
        contender.step()  # the first allocates the optimizer's state
        contender.step()
    return peak_rss()


def _time(
    names: tuple[str, ...],
    setup: Setup,
    repeats: int,
    laps: dict[str, list[Lap]],
    losses: dict[str, float],
    densities: dict[str, float],
) -> None:
    """Add each contender's laps, first loss and density to the dicts; the contenders of one call take turns."""
    with runtime(setup.threads, setup.matmul_precision):
        contenders = {name: Contender(name, setup) for name in names}
        for name, contender in contenders.items():
            with torch.no_grad():
                losses[name] = float(contender.loss())
            densities[name] = contender.density
        laps |= alternate({name: contender.step for name, contender in contenders.items()}, repeats)


def _verify(losses: dict[str, float], dtype: str) -> None:
    ours, theirs = losses["lightsparse-dense"], losses.get("transformers")
    if theirs is not None and not abs(ours - theirs) <= ROUNDING[dtype] * theirs:
        raise VerificationError(
            f"lightsparse-dense and transformers differ with the same weights: loss {ours} against {theirs}, "
            f"{dtype} rounding gives at most {ROUNDING[dtype]:g} relative"
        )
