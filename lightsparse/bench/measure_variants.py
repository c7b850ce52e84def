"""`bench kernels --variants`: forward + backward of whole attention variants against dense causal SDPA."""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from collections.abc import Callable
from functools import partial

import torch

from lightsparse.attention.core import AttentionShape
from lightsparse.bench import options, variants
from lightsparse.bench.against_dense import compared, dense, dense_kernel, product_notes
from lightsparse.bench.kernel_time import kernel_seconds
from lightsparse.bench.report import Report, Row
from lightsparse.bench.timing import alternate, runtime
from lightsparse.bench.variant_check import SMALL, equals_its_layout, equals_the_reference
from lightsparse.bench.variants import SPARSE, Contender, LayerInputs
from lightsparse.config.build import AttentionChoice

log = logging.getLogger(__name__)

Refusals = dict[tuple[str, str], dict[int, str]]  # (variant, what it refuses) → its sentence at each length


def measure(args: argparse.Namespace, report: Report) -> None:
    """Fill the report with a row per variant and density, for every combination of the listed dtypes and lengths.

    A variant that cannot take the shape is left out with its own sentence as a note. Raises VerificationError when a
    result is wrong, and ValueError for options out of range or when no variant is left.
    """
    given_too = [name for name in ("block", "pattern") if getattr(args, name)]
    if given_too:
        raise ValueError(f"--{given_too[0]} is given with --variants; a variant is what its YAML says, leave it out")
    if args.device != "cpu":
        raise ValueError(f"--device is {args.device} and --variants measures on the CPU only; leave --device out")
    for density in args.density or ():
        if not 0.0 < density <= 1.0:
            raise ValueError(f"--density is {density}; it is a share of dense tiles and must lie in (0, 1]")
    kv_heads, choices = options.kv_heads(args), variants.chosen(args.variants)
    report.notes += [
        "Forward + backward of the whole core in training mode (routing, pooling, gathers and auxiliary losses "
        "included), built from its YAML with the row's length as context; layouts are cached, as between training "
        "steps; learned parts are untrained, so density is what their first weights choose. Verified before timing: "
        f"output and all gradients at {SMALL} tokens against backend=reference, and sampled rows at the measured "
        "length where the layout is known before the input.",
        "Dense: causal scaled_dot_product_attention in the row's dtype. One process; dense and all variants of a "
        f"length and dtype take turns, {args.repeats} times. ms are medians, speedup is the median of the ratios "
        "within a turn, cpu_speedup the same in CPU time.",
        "asked: the density asked for; default = as the YAML has it, fixed = asked for another and refused.",
        *(["bf16 rows: bf16 inputs under autocast, parameters in fp32."] if "bf16" in args.dtype else []),
        *product_notes(args.dtype),
    ]
    if any(choice.core.selects_from_input for choice in choices.values()):
        report.notes.append(
            "Of variants that choose from the input: attend_ms is the time inside the attention kernels, forward and "
            f"backward, over the tables that the pass chose (median of {args.repeats} further passes); select_ms is "
            "the rest of ms: scores, choice, tables, pooling, gates and the losses that train them, backward included."
        )
    with runtime(args.threads, args.matmul_precision):
        small_errors: dict[tuple[str, str], float] = {}
        refusals: Refusals = {}
        for dtype, seq in itertools.product(args.dtype, args.seq):
            shape = AttentionShape(args.heads, kv_heads, args.head_dim, args.heads * args.head_dim, context=seq)
            given = variants.layer_inputs(shape, seq, options.DTYPES[dtype])
            rows: list[tuple[Contender, Row]] = []
            for name, choice in choices.items():
                log.info("%s, %s tokens: verifying %s", dtype, f"{seq:,}", name)
                contenders, fixed = _contenders(name, choice, shape, given, args.density, refusals)
                if contenders and (name, dtype) not in small_errors:
                    small_errors[name, dtype] = equals_the_reference(name, choice, shape, given.q.dtype)
                for contender in contenders:
                    of_layout = equals_its_layout(name, contender.core, given)
                    error = max(small_errors[name, dtype], of_layout or 0.0)
                    about = {**_about(name, contender, fixed, args), "seq": seq, "kv_heads": kv_heads, "dtype": dtype}
                    rows.append((contender, {**about, "rows_verified": of_layout is not None, "error": error}))
            log.info("%s, %s tokens: timing dense and %s in turns", dtype, f"{seq:,}", len(rows))
            calls: dict[str, Callable[[], object]] = {"dense": partial(_dense_forward_backward, given)}
            calls |= {str(i): partial(variants.forward_backward, c.core, given) for i, (c, _) in enumerate(rows)}
            laps, kernel = alternate(calls, args.repeats) if rows else {}, dense_kernel(given.q, given.k, given.v)
            for i, (contender, row) in enumerate(rows):
                result = compared(laps[str(i)], laps["dense"], contender.density) | {"dense_kernel": kernel}
                if contender.core.selects_from_input:
                    result |= _split(contender, given, float(str(result["ms"])), args.repeats)
                report.rows.append(row | result)
    said = _said(refusals)
    if not report.rows:
        raise ValueError(f"--variants {','.join(args.variants)} leaves nothing to measure: {' '.join(said)}")
    learned = [row for row in report.rows if "select_ms" in row]
    known_before = [row for row in report.rows if "select_ms" not in row]
    report.notes += said + slower_than_dense(known_before) + faster_than_dense(learned)


def _contenders(
    name: str,
    choice: AttentionChoice,
    shape: AttentionShape,
    given: LayerInputs,
    densities: list[float] | None,
    refusals: Refusals,
) -> tuple[list[Contender], bool]:
    """The variant as configured and at each density it can be solved for; whether it refused every one.

    densities None: SPARSE, if it is denser as configured. Adds to the refusals.
    """

    def refused(what: str, error: ValueError) -> None:
        refusals.setdefault((name, what), {}).setdefault(given.q.shape[2], str(error))

    try:
        found = [variants.as_configured(choice, shape, given)]
    except ValueError as error:
        refused("is left out", error)
        return [], False
    if densities is None:
        densities = [SPARSE] if found[0].density > SPARSE else []
    wanted = [density for density in densities if density != choice.config.density]
    for density in wanted:
        try:
            found.append(variants.at_density(choice, density, shape, given))
        except ValueError as error:
            refused(f"refuses density {density:g}", error)
    return found, bool(wanted) and len(found) == 1


def _said(refusals: Refusals) -> list[str]:
    """A note per variant and refusal, with the sentence of the shortest length."""
    notes = []
    for (name, what), of_lengths in refusals.items():
        at = " / ".join(f"{seq:,}" for seq in sorted(of_lengths))
        notes.append(f"{name} {what} at {at} tokens: {of_lengths[min(of_lengths)]}.")
    return notes


def _about(name: str, contender: Contender, fixed: bool, args: argparse.Namespace) -> Row:
    """What a row says beside its results."""
    asked = contender.asked
    return {
        "variant": name,
        "backend": "auto",
        "pass": "fwd+bwd",
        "heads": args.heads,
        "head_dim": args.head_dim,
        "block": getattr(contender.core.config, "block", None),
        "density_nominal": asked,
        "asked": "fixed" if fixed else "default" if asked is None else f"{asked:g}",
        "density": contender.density,
        "threads": args.threads,
        "matmul_precision": args.matmul_precision,
        "repeats": args.repeats,
    }


def slower_than_dense(rows: list[Row]) -> list[str]:
    """A sentence per variant, asked density and dtype that loses at a density of at most SPARSE: where, and from
    which measured length on it wins."""
    groups: dict[tuple, list[tuple[int, float, float]]] = {}
    for row in rows:
        key = (row["variant"], row["asked"], row["dtype"])
        groups.setdefault(key, []).append((int(row["seq"]), float(row["density"]), float(row["speedup"])))  # type: ignore[call-overload,arg-type]
    sentences = []
    for (name, asked, dtype), of_lengths in groups.items():
        lost = [(seq, ratio) for seq, density, ratio in of_lengths if density <= SPARSE and ratio < 1.0]
        if not lost:
            continue
        last = max(seq for seq, _, ratio in of_lengths if ratio < 1.0)
        won = min((seq for seq, _, _ in of_lengths if seq > last), default=None)
        at = ", ".join(f"{seq:,} tokens ({ratio:.3g}×)" for seq, ratio in sorted(lost))
        then = f"it wins from {won:,} tokens on" if won else "it wins at no longer length measured here"
        sentences.append(f"{name} ({asked}, {dtype}) is slower than dense at {at}; {then}.")
    return sentences


def faster_than_dense(rows: list[Row]) -> list[str]:
    """A sentence per learned variant, asked density and dtype: from which measured length on it beats dense attention,
    at that length and all longer ones, as a whole and with its attention alone."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        asked = "as configured" if row["asked"] in ("default", "fixed") else f"density {row['asked']}"
        groups.setdefault((row["variant"], asked, row["dtype"]), []).append(row)
    return [
        f"{name} ({asked}, {dtype}) beats dense {_from(of, 'ms')}; its attention alone {_from(of, 'attend_ms')}."
        for (name, asked, dtype), of in groups.items()
    ]


def _from(rows: list[Row], what: str) -> str:
    """`from 4,096 tokens on`, by a column of ms, or `at none up to 4,096 tokens`."""
    lengths = {int(str(row["seq"])): float(str(row[what])) < float(str(row["dense_ms"])) for row in rows}
    lost = [seq for seq, wins in lengths.items() if not wins]
    since = min((seq for seq in lengths if seq > max(lost, default=0)), default=None)
    return f"at none up to {max(lengths):,} tokens" if since is None else f"from {since:,} tokens on"


def _split(contender: Contender, given: LayerInputs, ms: float, repeats: int) -> Row:
    """The time of a pass that takes `ms`, in its attention and in everything else."""
    call = partial(variants.forward_backward, contender.core, given)
    attention = statistics.median(kernel_seconds(call) for _ in range(repeats)) * 1e3
    return {"select_ms": ms - attention, "attend_ms": attention}


def _dense_forward_backward(given: LayerInputs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(dense(given.q, given.k, given.v), (given.q, given.k, given.v), given.grad)
