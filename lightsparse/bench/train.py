"""`bench train`: whole training steps (forward, loss, backward, optimizer) of one shape in three implementations.

4 layers, d 512, 8 heads × 64, 2 key/value heads, MLP 1408 unless said otherwise, vocabulary 256, batch 1: our decoder
with block-sparse and with dense attention, and a transformers Llama with SDPA where the extra `hf` is installed, all
from the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import psutil
import torch

from lightsparse.bench import options
from lightsparse.bench.contenders import NAMES, OPTIMIZERS, Contender, Setup, installed
from lightsparse.bench.report import Report
from lightsparse.bench.timing import Lap, alternate, cpu_speedup, runtime, speedup
from lightsparse.bench.verify import VerificationError
from lightsparse.kernels.compute_dtype import keeps_fp32
from lightsparse.utils.allocator import keep_freed
from lightsparse.utils.machine import MIB, in_child, peak_rss, usable_cores

log = logging.getLogger(__name__)

EXAMPLE = "lightsparse bench train --context 2048,16384 --density 0.1 --dtype fp32 --threads 2"

# The relative difference between two dense models of the same weights that is still rounding.
ROUNDING = {"fp32": 1e-4, "bf16": 1e-2}
SPARE_MEMORY = 0.8  # share of the free memory that contenders may fill together
WARM_UP = 1024  # tokens of the step that loads libraries before a single one is measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_list(parser, "--context", options.count, [2048, 16384], "tokens per sample; the batch is one sample")
    options.add_list(parser, "--density", float, [0.1], "shares of dense tiles of the sparse model, at most")
    parser.add_argument("--window", type=options.count, metavar="W", help="tokens; the same window at every context")
    parser.add_argument("--block", type=options.count, default=128, metavar="B", help="tokens per block (128)")
    options.add_list(parser, "--dtype", options.dtype, ["fp32"], "fp32, bf16 (autocast over fp32 parameters)")
    options.add_list(parser, "--models", _model, list(installed()), "which models")
    for name, default in (("depth", 4), ("embed-dim", 512), ("heads", 8), ("kv-heads", 2), ("mlp-dim", 1408)):
        about = f"of the model ({default})"
        parser.add_argument(f"--{name}", type=options.count, default=default, metavar="N", help=about)
    parser.add_argument("--documents", type=options.count, metavar="T", help="packed documents of T tokens on average")
    parser.add_argument("--recompute", action="store_true", help="ours recomputes its layers: less memory, more time")
    parser.add_argument("--text", choices=("random", "stdlib"), default="random", help="the tokens (random)")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="the same for all (adamw)")
    options.add_runtime(parser, threads=usable_cores())
    parser.add_argument(
        "--repeats",
        type=options.count,
        default=3,
        metavar="R",
        help="timed steps of each model; 1 = the first step (3)",
    )
    parser.add_argument("--warm", action="store_true", help="with --repeats 1: the second step")
    options.add_json(parser)


@dataclass
class Found:
    """What is measured of one model under one setting."""

    laps: list[Lap] = field(default_factory=list)
    peak: int = 0  # bytes
    loss: float = 0.0  # before the first step
    density: float = 1.0
    parameters: int = 0
    layout_share: float | None = None  # of the last step's time; None where there are no layouts


def measure(args: argparse.Namespace, report: Report) -> None:
    """Fill the report with a row per model and setting.

    Raises VerificationError when the dense model's loss differs from that of transformers with the same weights,
    ValueError for documents with transformers, whose attention would read across their borders.
    """
    names = tuple(name for name in NAMES if name in args.models)
    if args.documents is not None and "transformers" in names:
        raise ValueError(
            "--documents is given, and transformers would read across their borders; add --models lightsparse"
        )
    once = args.repeats == 1
    if args.warm and not once:
        raise ValueError(f"--warm is given with --repeats {args.repeats}, whose steps are warm; leave it out")
    way = (
        f"of the {'second' if args.warm else 'first'} step alone, in a process of its own after a step of a short text"
        if once
        else f"a median of {args.repeats} steps"
    )
    report.notes.append(
        "One step = forward, mean cross-entropy over all tokens, backward, optimizer; the same weights, tokens, "
        f"dtype, optimizer and matmul precision ({args.matmul_precision!r}) for all; ms_per_step is {way}. "
        "loss is that before the first step. peak_rss_mib: a whole process with this model alone, imports included. "
        "layout_share: share of a step that building and looking up block layouts takes, a layout for all layers. "
        + (
            "Freed memory goes back to the system, as in a run that is short of it."
            if args.recompute
            else "Freed memory is kept for the next tensors, as in a run with room, for all of them."
        )
    )
    if "bf16" in args.dtype:
        report.notes += _product_notes()
    if "transformers" not in installed():
        report.notes.append("transformers is not installed and left out; pip install 'lightsparse[hf]' adds it.")
    densities = args.density if args.window is None else args.density[:1]
    for dtype, context, density in itertools.product(args.dtype, args.context, densities):
        setup = Setup(
            context,
            density,
            args.block,
            dtype,
            args.optimizer,
            args.threads,
            args.matmul_precision,
            depth=args.depth,
            embed_dim=args.embed_dim,
            heads=args.heads,
            kv_heads=args.kv_heads,
            mlp_dim=args.mlp_dim,
            window=args.window,
            documents=args.documents,
            recompute=args.recompute,
            text=args.text,
        )
        found, together = _once(names, setup, warm=args.warm) if once else _in_turns(names, setup, args.repeats)
        if not together and not once:
            report.notes.append(f"At {context} tokens the models do not fit together; they ran one after the other.")
        _verify({name: of.loss for name, of in found.items()}, dtype)
        for name, of in found.items():
            seconds = statistics.median(lap.wall for lap in of.laps)
            against = found.get("transformers")
            report.rows.append(
                {
                    "model": name,
                    **asdict(setup),
                    "parameters": of.parameters,
                    "density": of.density,
                    "ms_per_step": seconds * 1e3,
                    "us_per_token": seconds / context * 1e6,
                    "tokens_per_s": context / seconds,
                    "vs_transformers": None if against is None else speedup(of.laps, against.laps),
                    "cpu_vs_transformers": None if against is None else cpu_speedup(of.laps, against.laps),
                    "peak_rss_mib": of.peak / MIB,
                    "layout_share": of.layout_share,
                    "loss": of.loss,
                    "alternated": together,
                    "repeats": args.repeats,
                }
            )


def one_step(name: str, setup: Setup, warm: bool) -> Found:
    """The first step of a model, or warm the second. Meant for a fresh process."""
    with _machine(setup):
        if setup.context > WARM_UP:
            Contender(name, replace(setup, context=WARM_UP)).step()
        contender = Contender(name, setup)
        found = Found(parameters=contender.parameters)
        losses = [contender.step()] if warm else []
        contender.layout_seconds = 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(contender.step())
        found.laps = [Lap(time.perf_counter() - wall, time.process_time() - cpu)]
        found.loss = losses[0]
        found.density, found.layout_share = contender.density, _share(name, contender.layout_seconds, found.laps[-1])
    found.peak = peak_rss()
    return found


def peak_of_steps(name: str, setup: Setup) -> int:
    """Peak resident memory of two training steps, bytes. Meant for a fresh process."""
    with _machine(setup):
        contender = Contender(name, setup)
        contender.step()  # the first allocates the optimizer's state
        contender.step()
    return peak_rss()


def _once(names: Sequence[str], setup: Setup, *, warm: bool) -> tuple[dict[str, Found], bool]:
    found = {}
    for name in names:
        which = "the second step" if warm else "the first step"
        log.info("%s, %s tokens: %s of %s", setup.dtype, f"{setup.context:,}", which, name)
        found[name] = in_child(one_step, name, setup, warm)
    return found, False


def _in_turns(names: Sequence[str], setup: Setup, repeats: int) -> tuple[dict[str, Found], bool]:
    """What was found of each, and whether all were in memory together and took turns."""
    where = f"{setup.dtype}, {setup.context:,} tokens"
    log.info("%s: memory, a process per model", where)
    found = {name: Found(peak=in_child(peak_of_steps, name, setup)) for name in names}
    together = sum(of.peak for of in found.values()) < SPARE_MEMORY * psutil.virtual_memory().available
    log.info("%s: time, %s", where, "in turns" if together else "one after the other")
    for group in [names] if together else [(name,) for name in names]:
        _time({name: found[name] for name in group}, setup, repeats)
    return found, together


def _time(found: dict[str, Found], setup: Setup, repeats: int) -> None:
    """Add laps, first loss, density and the layouts' share; the contenders of one call take turns."""
    with _machine(setup):
        contenders = {name: Contender(name, setup) for name in found}
        losses: dict[str, list[float]] = {name: [] for name in found}

        def step(name: str) -> None:
            contenders[name].layout_seconds = 0.0
            losses[name].append(contenders[name].step())

        laps = alternate({name: partial(step, name) for name in found}, repeats)
        for name, of in found.items():
            contender = contenders[name]
            of.laps, of.loss, of.parameters, of.density = (
                laps[name],
                losses[name][0],
                contender.parameters,
                contender.density,
            )
            of.layout_share = _share(name, contender.layout_seconds, of.laps[-1])


@contextmanager
def _machine(setup: Setup) -> Iterator[None]:
    """Threads, precision and memory as every contender has them."""
    if not setup.recompute:  # which says that memory is short
        keep_freed()
    with runtime(setup.threads, setup.matmul_precision):
        yield


def _share(name: str, seconds: float, lap: Lap) -> float | None:
    return seconds / lap.wall if name == "lightsparse" else None


def _product_notes() -> list[str]:
    """In which dtype the matrix products of a bf16 step run, where it is not that of autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if not keeps_fp32(torch.device("cpu")):
            return []
    return [
        "bf16: this CPU multiplies fp32 matrices faster than bf16 ones, so ours keep their products in fp32 and q, k, "
        "v in bf16 (lightsparse/kernels/compute_dtype.py); transformers runs as autocast has it."
    ]


def _model(text: str) -> str:
    if text not in installed():
        raise ValueError(f"choose from {', '.join(installed())}")
    return text


def _verify(losses: dict[str, float], dtype: str) -> None:
    ours, theirs = losses.get("lightsparse-dense"), losses.get("transformers")
    if ours is not None and theirs is not None and not abs(ours - theirs) <= ROUNDING[dtype] * theirs:
        raise VerificationError(
            f"lightsparse-dense and transformers differ with the same weights: loss {ours} against {theirs}, "
            f"{dtype} rounding gives at most {ROUNDING[dtype]:g} relative"
        )
