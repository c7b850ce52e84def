"""`lightsparse bench`: measurements, each a module that is imported when it is asked for; table and compare."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from lightsparse.config.targets import did_you_mean
from lightsparse.utils.atomic_files import writable

MEASUREMENTS = {  # each a module of this package
    "kernels": "block-sparse attention against dense SDPA and FlexAttention; verified, then timed",
    "per_query": "attention over key blocks that every token chose for itself; verified, then timed",
    "memory": "peak memory of attention forward + backward as the sequence grows",
    "train": "tokens/s and peak memory of whole training steps: ours sparse, ours dense, transformers",
    "checkpoint": "what saving costs a training step, in the step's way and beside it",
    "comm": "bytes that context parallelism sends per rank and layer; counted, predicted, and on paper",
    "data": "tokens/s of reading, tokenizing, packing and loading text, and the loader's share of a step",
}
SAVED = {
    "table": "rows of saved measurements as Markdown, with command and hardware",
    "compare": "two saved measurements: rows of equal settings, and a ratio each",
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
    console = Console(width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else 120)
    if words and not words[0].startswith("-") and words[0] not in (known := [*MEASUREMENTS, *SAVED]):
        near = did_you_mean(words[0], known) or f"; there are {', '.join(known)}"
        errors.print(f"bench has no {words[0]}{near}", markup=False, highlight=False)
        return 2
    args = _parser(words).parse_args(words)
    handler = RichHandler(console=errors, show_path=False, markup=False)
    handler.addFilter(_Once())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        return _saved(args, console) if args.command in SAVED else _measured(args, words, console, errors)
    except (ValueError, FileNotFoundError) as error:
        errors.print(str(error), markup=False, highlight=False)
        return 2


def _measured(args: argparse.Namespace, words: list[str], console: Console, errors: Console) -> int:
    from lightsparse.bench.report import Report
    from lightsparse.bench.verify import VerificationError

    if args.json:
        writable(args.json.parent, "--json")
    report = Report(args.command, command=f"lightsparse bench {_without_json(words)}")
    try:
        import_module(f"lightsparse.bench.{args.command}").measure(args, report)
    except (VerificationError, BrokenProcessPool) as error:
        errors.print(str(error), markup=False, highlight=False)
        return 1
    report.show(console)
    if args.json:
        report.save(args.json)
    return 0


def _saved(args: argparse.Namespace, console: Console) -> int:
    """What earlier measurements have saved, shown."""
    from lightsparse.bench import compare
    from lightsparse.bench.report import load

    if args.command == "compare":
        compare.show(args.files[0], args.files[1], console)
    else:
        for path in args.files:
            Console(soft_wrap=True).print(load(path).markdown(), markup=False, highlight=False)
    return 0


def _without_json(words: list[str]) -> str:
    """The command line without where its result goes: that is the reader's own affair."""
    kept = [word for i, word in enumerate(words) if word != "--json" and "--json" not in words[max(i - 1, 0) : i]]
    return shlex.join(word for word in kept if not word.startswith("--json="))


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Of these words: only the measurement that they name is imported, for its options."""
    parser = argparse.ArgumentParser("lightsparse bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in MEASUREMENTS.items():
        if name not in words[:1]:
            commands.add_parser(name, help=purpose)
            continue
        module = import_module(f"lightsparse.bench.{name}")
        about = (module.__doc__ or "").partition("\n\n")[2] or None
        command = commands.add_parser(
            name,
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{about}" if about else purpose,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    for name, purpose in SAVED.items():
        saved, count = commands.add_parser(name, help=purpose), 2 if name == "compare" else "+"
        saved.add_argument("files", nargs=count, type=Path, metavar="FILE.json", help="what --json wrote")
    return parser
