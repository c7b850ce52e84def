"""`bench per_query`: attention where every token has chosen key blocks of its own, verified, then timed.

Each token reads its own block and others drawn at random from its past, the same for the query heads of a key/value
head: the work of a trained selection with the least that neighbours can share. us_per_token is forward + backward,
microseconds of CPU time per token and key/value head.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from dataclasses import replace

import torch

from lightsparse.bench import options
from lightsparse.bench.report import Report, Row
from lightsparse.bench.timing import alternate, median_ms, runtime
from lightsparse.bench.verify import check, inputs, ours, sampled_rows
from lightsparse.kernels.native.call import available
from lightsparse.patterns import BlockLayout, LocalWindow

log = logging.getLogger(__name__)
EXAMPLE = "lightsparse bench per_query --seq 8192,32768 --heads 4 --kv-heads 1 --block 64 --chosen 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_list(parser, "--seq", options.count, [8192, 32768], "sequence lengths, tokens")
    options.add_heads(parser)
    parser.add_argument("--block", type=options.count, default=64, metavar="N", help="keys per block (64)")
    parser.add_argument("--chosen", type=options.count, default=16, metavar="K", help="blocks a token reads (16)")
    options.add_list(parser, "--dtype", options.dtype, ["fp32", "bf16"], "fp32, bf16")
    options.add_runtime(parser, threads=1)
    parser.add_argument("--repeats", type=options.count, default=3, metavar="R", help="timed rounds (3)")
    options.add_json(parser)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Fill the report with a row per length and dtype. Raises VerificationError when a result is wrong."""
    kv_heads, backend = options.kv_heads(args), "native" if available() else "per_query"
    report.notes.append(
        "Forward + backward. us_per_token: median CPU time per token and key/value head, all query heads of its group "
        "included. Verified before timing: sampled rows, output and gradients, against dense attention in fp64."
    )
    with runtime(args.threads, args.matmul_precision):
        for dtype, seq in itertools.product(args.dtype, args.seq):
            log.info("%s, %s tokens", dtype, f"{seq:,}")
            layout = chosen_at_random(seq, kv_heads, args.block, args.chosen)
            given = inputs(seq, args.heads, kv_heads, args.head_dim, options.DTYPES[dtype])
            attend = ours(layout, backend)
            error = check(attend, given, layout, sampled_rows(seq, args.block), f"{seq} tokens", backward=True)

            def step(attend=attend, given=given) -> None:
                torch.autograd.grad(attend(given.q, given.k, given.v), (given.q, given.k, given.v), given.grad)

            laps = alternate({backend: step}, args.repeats)[backend]
            about: Row = {
                "dtype": dtype,
                "seq": seq,
                "backend": backend,
                "heads": args.heads,
                "kv_heads": kv_heads,
                "head_dim": args.head_dim,
                "block": args.block,
                "chosen": args.chosen,
                "threads": args.threads,
                "matmul_precision": args.matmul_precision,
            }
            cpu = statistics.median(lap.cpu for lap in laps)
            result: Row = {"ms": median_ms(laps), "us_per_token": cpu * 1e6 / (seq * kv_heads), "error": error}
            report.rows.append({**about, **result})


def chosen_at_random(seq: int, kv_heads: int, block: int, chosen: int) -> BlockLayout:
    """A row per token and key/value head: its own block and up to `chosen` − 1 others of its past."""
    generator = torch.Generator().manual_seed(0)
    base = LocalWindow(1).layout(seq, block=block).per_token(0, seq)
    blocks, own_N = -(-seq // block), torch.arange(seq) // block
    tables = []
    for _ in range(kv_heads):
        score_NY = torch.rand(seq, blocks, generator=generator)
        score_NY[torch.arange(blocks) > own_N[:, None]] = -1.0
        score_NY[torch.arange(seq), own_N] = 2.0
        best = score_NY.topk(min(chosen, blocks), dim=1)
        ids = torch.where(best.values < 0, blocks, best.indices).sort(1).values
        tables.append(torch.where(ids == blocks, -1, ids).int())
    return replace(base, kv_indices=torch.stack(tables)[None])
