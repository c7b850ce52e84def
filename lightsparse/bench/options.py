"""Command-line options the benchmarks share: lists (`--seq 4096,16384` or `--seq 4096 16384`), dtypes, threads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Flatten(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [item for part in values or [] for item in part])


def add_list(
    parser: argparse.ArgumentParser, name: str, of: Callable[[str], object], default: list | None, help: str
) -> None:
    """An option that takes several values, separated by commas or spaces. default None: it may be left out."""

    def values(text: str) -> list:
        try:
            return [of(part) for part in text.split(",") if part]
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error

    shown = help if default is None else f"{help} ({','.join(str(value) for value in default)})"
    parser.add_argument(name, nargs="+", action=_Flatten, type=values, default=default, metavar="…", help=shown)


def count(text: str) -> int:
    """A whole number of at least 1, for use as an option's type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"dtype {text!r} is not known; choose from {', '.join(DTYPES)}")
    return text


def add_heads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", type=count, default=4, metavar="H", help="query heads (4)")
    parser.add_argument("--kv-heads", type=count, metavar="H", help="key/value heads; must divide --heads (as --heads)")
    parser.add_argument("--head-dim", type=count, default=64, metavar="D", help="dimensions per head (64)")


def kv_heads(args: argparse.Namespace) -> int:
    """--kv-heads, or --heads without it. Raises ValueError when it does not divide --heads."""
    chosen = args.kv_heads or args.heads
    if args.heads % chosen:
        raise ValueError(f"--kv-heads is {chosen} and --heads is {args.heads}; kv-heads must divide heads")
    return chosen


def add_runtime(parser: argparse.ArgumentParser, *, threads: int) -> None:
    parser.add_argument("--threads", type=count, default=threads, metavar="T", help=f"CPU threads ({threads})")
    parser.add_argument(
        "--matmul-precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="torch.set_float32_matmul_precision, the same for every contender (highest)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, hardware, versions and command there")
