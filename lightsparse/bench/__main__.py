"""`python -m lightsparse.bench`: kernels, per_query, memory, train, checkpoint, comm, data; table and compare."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from lightsparse.bench import checkpoint, comm, compare, data, kernels, memory, per_query, train
from lightsparse.bench.report import Report, load
from lightsparse.bench.verify import VerificationError

MEASUREMENTS = {
    "kernels": (kernels, "block-sparse attention against dense SDPA and FlexAttention; verified, then timed"),
    "per_query": (per_query, "attention over key blocks that every token chose for itself; verified, then timed"),
    "memory": (memory, "peak memory of attention forward + backward as the sequence grows"),
    "train": (train, "tokens/s and peak memory of whole training steps: ours sparse, ours dense, transformers"),
    "checkpoint": (checkpoint, "what saving costs a training step, in the step's way and beside it"),
    "comm": (comm, "bytes that context parallelism sends per rank and layer; counted, predicted, and on paper"),
    "data": (data, "tokens/s of reading, tokenizing, packing and loading text, and the loader's share of a step"),
}


class _Once(logging.Filter):
    """Lets each sentence through once: a variant that is built many times says what it has to say each time."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        sentence = record.getMessage()
        is_new = sentence not in self.said
        self.said.add(sentence)
        return is_new


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a wrong result, 2 for wrong options."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(words)
    console = Console(width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else 120)
    handler = RichHandler(console=errors, show_path=False, markup=False)
    handler.addFilter(_Once())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        if args.command == "table":
            for path in args.files:
                Console(soft_wrap=True).print(load(path).markdown(), markup=False, highlight=False)
            return 0
        if args.command == "compare":
            compare.show(args.files[0], args.files[1], console)
            return 0
        report = Report(args.command, command=f"python -m lightsparse.bench {_without_json(words)}")
        MEASUREMENTS[args.command][0].measure(args, report)
    except (ValueError, FileNotFoundError) as error:
        errors.print(str(error), markup=False, highlight=False)
        return 2
    except (VerificationError, BrokenProcessPool) as error:
        errors.print(str(error), markup=False, highlight=False)
        return 1
    report.show(console)
    if args.json:
        report.save(args.json)
    return 0


def _without_json(words: list[str]) -> str:
    """The command line without where its result goes: that is the reader's own affair."""
    kept = [word for i, word in enumerate(words) if word != "--json" and "--json" not in words[max(i - 1, 0) : i]]
    return shlex.join(word for word in kept if not word.startswith("--json="))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lightsparse.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, purpose) in MEASUREMENTS.items():
        about = (module.__doc__ or "").partition("\n\n")[2] or None
        command = commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{about}" if about else purpose,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    table = commands.add_parser("table", help="rows of saved measurements as Markdown, with command and hardware")
    side_by_side = commands.add_parser(
        "compare", help="two saved measurements: rows of equal settings, and a ratio each"
    )
    side_by_side.add_argument("files", nargs=2, type=Path, metavar="FILE.json", help="A and B, what --json wrote")
    table.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what --json wrote")
    return parser


if __name__ == "__main__":
    sys.exit(main())
