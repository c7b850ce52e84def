"""`bench memory`: peak memory of attention forward + backward as the sequence grows.

The window is fixed, hence the blocks per row: linear memory shows as `growth` near the ratio of the lengths.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from lightsparse.bench import options
from lightsparse.bench.against_dense import product_notes
from lightsparse.bench.report import Report, Row
from lightsparse.bench.timing import runtime
from lightsparse.bench.verify import Inputs, inputs, ours
from lightsparse.kernels.native.call import available
from lightsparse.patterns import LocalWindow
from lightsparse.utils.machine import MIB, current_rss, in_child, peak_rss

log = logging.getLogger(__name__)

EXAMPLE = "lightsparse bench memory --seq 16384,65536,262144 --block 64,128 --window 1024"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_list(parser, "--seq", options.count, [16384, 65536, 262144], "sequence lengths, tokens, ascending")
    options.add_heads(parser)
    options.add_list(parser, "--block", options.count, [64, 128], "block sizes, tokens")
    parser.add_argument("--window", type=options.count, default=1024, metavar="W", help="tokens (1024)")
    options.add_list(parser, "--dtype", options.dtype, ["fp32"], "fp32, bf16")
    options.add_runtime(parser, threads=1)
    options.add_json(parser)


@dataclass(frozen=True)
class Case:
    """One measurement; it travels to the child process."""

    seq: int  # tokens
    heads: int
    kv_heads: int
    head_dim: int
    block: int  # tokens
    window: int  # tokens
    backend: str
    dtype: str
    threads: int
    matmul_precision: str


def measure(args: argparse.Namespace, report: Report) -> None:
    """Fill the report with a row per dtype, block and length; `growth` compares a row with the length before it."""
    kv_heads = options.kv_heads(args)
    report.notes.append(
        "Each row is a process of its own. increase_mib: peak resident memory during one forward + backward, above "
        "what was resident with PyTorch imported and q, k, v and the output's gradient in place; it holds the output, "
        "the gradients of q, k and v and all working memory. peak_rss_mib: the whole process. growth: increase ÷ "
        "increase at the length before."
    )
    report.notes += product_notes(args.dtype)
    for dtype, block in itertools.product(args.dtype, args.block):
        before: float | None = None
        for seq in sorted(args.seq):
            log.info("%s, %s tokens, block %s", dtype, f"{seq:,}", block)
            shape = (seq, args.heads, kv_heads, args.head_dim, block, args.window)
            case = Case(*shape, "native" if available() else "blocked", dtype, args.threads, args.matmul_precision)
            increase, peak = in_child(peak_of_pass, case)
            row: Row = {
                "pass": "fwd+bwd",
                **asdict(case),
                "increase_mib": increase / MIB,
                "bytes_per_token": increase / seq,
                "growth": increase / before if before else None,
                "peak_rss_mib": peak / MIB,
            }
            report.rows.append(row)
            before = increase


def peak_of_pass(case: Case) -> tuple[int, int]:
    """Bytes: (peak over the resident memory before the pass, peak of the process). Meant for a fresh process."""
    with runtime(case.threads, case.matmul_precision):
        small = replace(case, seq=min(case.seq, 4 * case.block))
        _forward_backward(small, _inputs(small))  # loads libraries, starts threads
        given = _inputs(case)
        resident = current_rss()
        _forward_backward(case, given)
    return peak_rss() - resident, peak_rss()


def _inputs(case: Case) -> Inputs:
    return inputs(case.seq, case.heads, case.kv_heads, case.head_dim, options.DTYPES[case.dtype])


def _forward_backward(case: Case, given: Inputs) -> tuple[Tensor, ...]:
    layout = LocalWindow(case.window).layout(case.seq, block=case.block, heads=case.heads, kv_heads=case.kv_heads)
    out = ours(layout, case.backend)(given.q, given.k, given.v)
    return out, *torch.autograd.grad(out, (given.q, given.k, given.v), given.grad)
