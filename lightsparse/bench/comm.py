"""`bench comm`: bytes that context parallelism sends per rank and layer, counted and predicted.

Forward and backward of one attention layer over a sequence split contiguously. Up to --measure ranks run as processes
and count what they send; beyond, the numbers are the model's (predicted = counted wherever both exist, or it fails).
`of_ring`: share of what the ring sends, which is what every rank's keys cost when they go all the way round.
"""

from __future__ import annotations

import argparse
import itertools
import logging

import torch

from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.attention.fixed import FixedPatternAttention
from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from lightsparse.bench import options
from lightsparse.bench.ranks import on_ranks
from lightsparse.bench.report import Report
from lightsparse.bench.verify import VerificationError
from lightsparse.context_parallel.prediction import KeyBytes, gather_sent, ring_sent, sparse_sent
from lightsparse.context_parallel.shard import ContextShard
from lightsparse.context_parallel.split import Split, split
from lightsparse.patterns import GlobalTokens, LocalWindow, Pattern
from lightsparse.utils.machine import MIB

log = logging.getLogger(__name__)

EXAMPLE = "lightsparse bench comm --seq 65536 --ranks 2,4 --pattern window --window 4096 --sinks 4"
PATTERNS = ("window", "block_sparse", "dense")
EXCHANGES = ("sparse", "ring", "gather")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_list(parser, "--seq", options.count, [65536], "sequence lengths, tokens")
    options.add_list(parser, "--ranks", options.count, [2, 4], "ranks that share a sequence")
    options.add_list(parser, "--pattern", _one_of(PATTERNS), ["window"], ", ".join(PATTERNS))
    options.add_list(parser, "--exchange", _one_of(EXCHANGES), list(EXCHANGES), ", ".join(EXCHANGES))
    parser.add_argument("--window", type=options.count, default=4096, metavar="W", help="of window, tokens (4096)")
    parser.add_argument("--sinks", type=int, default=4, metavar="S", help="of window, tokens (4)")
    parser.add_argument("--block", type=options.count, default=64, metavar="B", help="tokens per block (64)")
    options.add_heads(parser)
    options.add_list(parser, "--dtype", options.dtype, ["fp32"], "fp32, bf16")
    parser.add_argument(
        "--measure", type=int, default=4, metavar="R", help="most ranks that are run and counted; 0 = on paper (4)"
    )
    options.add_json(parser)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Fill the report with a row per pattern, length, ranks and exchange.

    Raises VerificationError where what was counted is not what was predicted, ValueError for what does not fit.
    """
    kv_heads = options.kv_heads(args)
    report.notes.append(
        "MiB that the busiest rank sends in one layer, one sample: keys and values and, in the backward, their "
        "gradients (the ring's keys travel twice, its gradients in fp32). counted: by ranks that ran, over gloo; "
        "predicted: from the layout alone. of_ring: predicted share of the ring's bytes, all ranks together."
    )
    cases = list(itertools.product(args.pattern, args.seq, args.dtype, args.exchange))
    for ranks in args.ranks:
        counted: list[list[tuple[int, int]]] = []
        if ranks <= args.measure:
            log.info("%s ranks: counting", ranks)
            by_rank = on_ranks(ranks, _count_all, args, kv_heads, cases)
            counted = [list(of_case) for of_case in zip(*by_rank, strict=True)]
        for number, (pattern, seq, dtype, exchange) in enumerate(cases):
            core = _core(pattern, args, kv_heads)
            parts = split("contiguous", seq, core.split_granularity(), ranks)
            size = KeyBytes(kv_heads, args.head_dim, options.DTYPES[dtype].itemsize)
            predicted = list(zip(*_predicted(exchange, pattern, core, parts, size), strict=True))
            found = counted[number] if counted else None
            if found is not None and found != predicted:
                raise VerificationError(
                    f"{pattern}, {seq} tokens, {ranks} ranks, {exchange}: of each rank, (keys, gradients) are {found} "
                    f"bytes by count and {predicted} by prediction"
                )
            ring = sum(map(sum, ring_sent(parts, size)))
            report.rows.append(
                {
                    "pattern": pattern,
                    "seq": seq,
                    "ranks": ranks,
                    "exchange": exchange,
                    "heads": args.heads,
                    "kv_heads": kv_heads,
                    "head_dim": args.head_dim,
                    "block": core.block,
                    "window": args.window if pattern == "window" else None,
                    "sinks": args.sinks if pattern == "window" else None,
                    "dtype": dtype,
                    "predicted_mib": max(map(sum, predicted)) / MIB,
                    "counted_mib": None if found is None else max(map(sum, found)) / MIB,
                    "predicted_bytes": sum(map(sum, predicted)),
                    "counted_bytes": None if found is None else sum(map(sum, found)),
                    "of_ring": sum(map(sum, predicted)) / ring if ring else None,
                }
            )


def _predicted(
    exchange: str, pattern: str, core: FixedPatternAttention, parts: Split, size: KeyBytes
) -> tuple[list[int], list[int]]:
    """Bytes each rank sends of keys, and of gradients."""
    if exchange == "gather":
        return gather_sent(parts, size)
    if pattern == "dense":  # a whole layout has a number per pair of blocks; what it says is known
        return _dense_sent(parts, size) if exchange == "sparse" else ring_sent(parts, size)
    layout = core.layout(parts.length, SequenceContext(torch.arange(1)[None]), torch.device("cpu"))
    if exchange == "sparse":
        return sparse_sent(layout, parts, size)
    first = layout.kv_indices.masked_fill(layout.kv_indices < 0, layout.num_kv_blocks).amin((0, 1, 3)).long()
    row_rank = parts.rank_of[:: layout.q_block]
    reached = parts.rank_of[:: layout.kv_block][first.clamp(max=layout.num_kv_blocks - 1)]
    return ring_sent(parts, size, hops=int((row_rank - reached).max()) + 1)  # causal, contiguous: only ranks before


def _dense_sent(parts: Split, size: KeyBytes) -> tuple[list[int], list[int]]:
    """Causal, contiguous: a rank fetches all that comes before it."""
    world, counts = parts.world, parts.counts
    keys = [(world - 1 - rank) * counts[rank] * size.of_key for rank in range(world)]
    return keys, [sum(counts[:rank]) * size.of_key for rank in range(world)]


def _count_all(
    rank: int, world: int, args: argparse.Namespace, kv_heads: int, cases: list[tuple[str, int, str, str]]
) -> list[tuple[int, int]]:
    """Forward and backward on this rank for each case: bytes of keys and of gradients it has sent."""
    torch.manual_seed(rank)
    found = []
    for pattern, seq, dtype, exchange in cases:
        core = _core(pattern, args, kv_heads)
        parts = split("contiguous", seq, core.split_granularity(), world)
        shard = ContextShard(parts, torch.distributed.group.WORLD, exchange)  # type: ignore[arg-type]
        sizes = [(1, heads, len(shard.tokens), args.head_dim) for heads in (args.heads, kv_heads, kv_heads)]
        q, k, v = (torch.randn(size, dtype=options.DTYPES[dtype]).requires_grad_() for size in sizes)
        core(q, k, v, ctx=SequenceContext(shard.tokens[None], shard=shard)).out.sum().backward()
        sent = shard.traffic.sent
        found.append((sent.get("keys", 0), sent.get("key gradients", 0)))
    return found


def _core(pattern: str, args: argparse.Namespace, kv_heads: int) -> FixedPatternAttention:
    """window: exact to the token; block_sparse: the segments, window and sinks of conf/attention/block_sparse.yaml."""
    shape = AttentionShape(args.heads, kv_heads, args.head_dim, args.heads * args.head_dim)
    if pattern == "dense":
        return DenseAttention(DenseConfig(block=args.block), shape)
    if pattern == "window":
        return SlidingWindowAttention(
            SlidingWindowConfig(window=args.window, sinks=args.sinks, block=args.block), shape
        )
    more: dict[str, Pattern | None] = {"local": LocalWindow(256), "sinks": GlobalTokens(4)}
    config = BlockSparseConfig(block=128, segment_lengths=(2048, 8192), dilation_rates=(4, 16), pattern=more)
    return BlockSparseRingDilatedAttention(config, shape)


def _one_of(names: tuple[str, ...]):
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return check
