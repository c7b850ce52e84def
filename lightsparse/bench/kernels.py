"""`bench kernels`: block-sparse attention against dense causal SDPA, verified, then timed in alternation.

speedup = dense time ÷ sparse time; flop_ratio = area of dense causal tiles ÷ area of computed tiles = 1 / density;
efficiency = speedup ÷ flop_ratio: 1.0 means that sparse tiles cost what dense tiles cost.
With --device cuda: FlexAttention and `blocked`, forward and backward, on the GPU.
With --variants: whole attention variants from conf/attention/ in place of patterns, forward + backward in training;
of those that choose from the input, the time of the choice and of attention apart.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lightsparse.bench import measure_variants, options
from lightsparse.bench.against_dense import compared, dense, dense_kernel, product_notes
from lightsparse.bench.choice import KINDS, pattern_at
from lightsparse.bench.report import Report, Row
from lightsparse.bench.timing import alternate, runtime
from lightsparse.bench.verify import Attend, Inputs, check, inputs, ours, sampled_rows
from lightsparse.kernels.native.call import available
from lightsparse.patterns import BlockLayout
from lightsparse.utils.allocator import keep_freed
from lightsparse.utils.compat.torch import compilation_error

_DOES_NOT_COMPILE = (compilation_error(), NotImplementedError)

log = logging.getLogger(__name__)
BLOCKS, DENSITIES = (64, 128), (0.05, 0.2)  # of patterns
BACKENDS = ("native", "blocked", "flex")

EXAMPLE = """lightsparse bench kernels --seq 16384 --heads 4 --head-dim 64 --block 64,128 --density 0.05,0.2
  lightsparse bench kernels --seq 8192,16384,32768 --variants all
  lightsparse bench kernels --seq 4096,8192,16384 --variants learned --dtype fp32 --repeats 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_list(parser, "--seq", options.count, [16384], "sequence lengths, tokens")
    options.add_heads(parser)
    about_variants = "YAMLs of conf/attention, all, or learned (those that choose): measure these, not patterns"
    options.add_list(parser, "--variants", str, None, about_variants)
    options.add_list(parser, "--block", options.count, None, f"block sizes of patterns, tokens ({_shown(BLOCKS)})")
    about_density = (
        f"shares of dense tiles: of patterns at least ({_shown(DENSITIES)}), of variants at most, beside what their "
        "YAML gives (0.2, where that is more)"
    )
    options.add_list(parser, "--density", float, None, about_density)
    options.add_list(parser, "--dtype", options.dtype, ["fp32", "bf16"], "fp32, bf16; dense SDPA runs in the same")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where patterns are measured (cpu)")
    parser.add_argument("--pattern", choices=KINDS, help="window, or mixed with global tokens and strides (window)")
    options.add_runtime(parser, threads=1)
    parser.add_argument("--repeats", type=options.count, default=5, metavar="R", help="timed rounds (5)")
    about_backends = "native, blocked, flex (which compiles for a minute): measure these, of patterns"
    options.add_list(parser, "--backends", _backend, list(BACKENDS), about_backends)
    options.add_json(parser)


def _backend(text: str) -> str:
    if text not in BACKENDS:
        raise argparse.ArgumentTypeError(f"backend {text!r} is not measured; choose from {', '.join(BACKENDS)}")
    return text


def _shown(values: Sequence[object]) -> str:
    return ",".join(str(value) for value in values)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Fill the report with a row per backend and pass, for every combination of the listed options.

    Raises VerificationError when a result is wrong and ValueError for options out of range.
    """
    if keep_freed():
        report.notes.append("Freed memory is kept for the next tensors on both sides, as in a training run with room.")
    if args.variants:
        measure_variants.measure(args, report)
    else:
        _measure_patterns(args, report)


def _measure_patterns(args: argparse.Namespace, report: Report) -> None:
    kind, blocks, densities = args.pattern or KINDS[0], args.block or BLOCKS, args.density or DENSITIES
    kv_heads, device = options.kv_heads(args), torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch finds no CUDA device here; leave it out to measure on the CPU")
    report.notes.append(
        f"Dense: causal scaled_dot_product_attention in the row's dtype. One process; dense and the backends "
        f"take turns, {args.repeats} times, under the same matmul precision. ms are medians, speedup is the median of "
        "the ratios within a turn, cpu_speedup the same in CPU time."
    )
    if device.type == "cpu":
        report.notes += product_notes(args.dtype)
    with runtime(args.threads, args.matmul_precision):
        # On CPU FlexAttention has a forward only, which is measured apart from ours.
        with_flex = "flex" in args.backends and device.type == "cpu"
        backends = [name for name in args.backends if name != "flex" or device.type == "cuda"]
        if "native" in backends and (device.type == "cuda" or not available()):
            backends.remove("native")
            why = "it runs on CPU only" if device.type == "cuda" else "there is no C++ compiler to build it with"
            report.notes.append(f"native is left out: {why}.")
        for dtype, seq, block, density in itertools.product(args.dtype, args.seq, blocks, densities):
            log.info("%s, %s tokens, block %s, density %s", dtype, f"{seq:,}", block, density)
            pattern = pattern_at(kind, density, seq, block)
            layout = pattern.layout(seq, block=block, heads=args.heads, kv_heads=kv_heads, device=device)
            given = inputs(seq, args.heads, kv_heads, args.head_dim, options.DTYPES[dtype], device)
            sparse = {name: ours(layout, name) for name in backends}
            errors = {name: _verify(name, given, layout, kind) for name in backends}
            if with_flex:
                try:
                    sparse["flex"], errors["flex"] = _flex(layout, given)
                except _DOES_NOT_COMPILE as error:
                    with_flex = False
                    reason = " ".join(str(error).split())[:300]
                    report.notes.append(f"FlexAttention is left out, it does not compile here: {reason}")
            about: Row = {
                "pattern": kind,
                "seq": seq,
                "heads": args.heads,
                "kv_heads": kv_heads,
                "head_dim": args.head_dim,
                "block": block,
                "density_nominal": density,
                "density": layout.density(),
                "dtype": dtype,
                "threads": args.threads,
                "matmul_precision": args.matmul_precision,
                "device": args.device,
                "dense_kernel": dense_kernel(given.q, given.k, given.v),
                "repeats": args.repeats,
            }
            trainable = {name: sparse[name] for name in backends}  # FlexAttention has no backward on CPU
            for name, contenders, run in (("fwd", sparse, _forward), ("fwd+bwd", trainable, _forward_backward)):
                calls = {key: run(attend, given) for key, attend in {"dense": dense, **contenders}.items()}
                laps = alternate(calls, args.repeats, device)
                for key in contenders:
                    result = compared(laps[key], laps["dense"], layout.density())
                    if device.type == "cuda":
                        result["cpu_speedup"] = None  # of launching
                    report.rows.append({"backend": key, "pass": name, **about, **result, "error": errors[key]})


def _verify(backend: str, given: Inputs, layout: BlockLayout, kind: str) -> float:
    """Largest relative error: every row at a small ragged size at half density, sampled rows at the measured size."""
    (heads, seq, head_dim), kv_heads, block = given.q.shape[1:], given.k.shape[1], layout.q_block
    small, device = min(seq, 8 * block - block // 3), given.q.device
    small_pattern = pattern_at(kind, 0.5, small, block)
    small_layout = small_pattern.layout(small, block=block, heads=heads, kv_heads=kv_heads, device=device)
    small_given = inputs(small, heads, kv_heads, head_dim, given.q.dtype, device)
    cases = ((small_layout, small_given, torch.arange(small)), (layout, given, sampled_rows(seq, block)))
    errors = []
    for of, problem, rows in cases:
        what = f"backend {backend}, {of.num_queries} tokens, block {block}"
        errors.append(check(ours(of, backend), problem, of, rows, what, backward=True))
    return max(errors)


def _forward(attend: Attend, given: Inputs) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            attend(given.q, given.k, given.v)

    return run


def _forward_backward(attend: Attend, given: Inputs) -> Callable[[], object]:
    return lambda: torch.autograd.grad(attend(given.q, given.k, given.v), (given.q, given.k, given.v), given.grad)


def _flex(layout: BlockLayout, given: Inputs) -> tuple[Attend, float]:
    """Compiled FlexAttention over the layout, and its largest relative error. Raises _DOES_NOT_COMPILE."""
    heads = given.q.shape[1]
    block_mask = layout.to_flex(batch=1, heads=heads)
    torch.compiler.reset()  # past its limit of recompilations it would run eagerly, over every tile
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # On CPU it refuses inputs that require gradients, under no_grad as well.
        return compiled(q.detach(), k.detach(), v.detach(), block_mask=block_mask, enable_gqa=heads != k.shape[1])

    attend(given.q, given.k, given.v)
    rows = sampled_rows(given.q.shape[2], layout.q_block)
    return attend, check(attend, given, layout, rows, "FlexAttention", backward=False)
