"""`bench data`: how fast text becomes batches, and what share of a training step the loader takes.

Python's standard library, or text files of yours: reading, tokenizing, packing, and the loader as training uses it,
beside one step of the model of `bench train` at the same context.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Literal, TypeVar

from lightsparse.bench import options
from lightsparse.bench.contenders import Contender, Setup
from lightsparse.bench.report import Report
from lightsparse.bench.timing import runtime
from lightsparse.data.encoding import encode_in_memory
from lightsparse.data.files import FilesData
from lightsparse.data.module import DataModule
from lightsparse.data.source import SampleSet
from lightsparse.data.stdlib import StdlibData
from lightsparse.data.text import TextConfig
from lightsparse.data.tokenizer import BPE, Bytes, TokenizerConfig

T = TypeVar("T")

EXAMPLE = "lightsparse bench data --context 4096 --tokenizer bytes,bpe"

TOKENIZERS = ("bytes", "bpe")
PACKINGS: tuple[Literal["concat", "isolate"], ...] = ("concat", "isolate")
_DENSITY, _BLOCK = 0.1, 128  # of the step beside which the loader is put


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=options.count, default=4096, metavar="N", help="tokens of a sample (4096)")
    options.add_list(parser, "--tokenizer", _tokenizer, ["bytes", "bpe"], "bytes, bpe")
    parser.add_argument("--vocab-size", type=options.count, default=2048, metavar="V", help="ids of the BPE (2048)")
    parser.add_argument("--path", metavar="FILES", help="text files in place of the standard library, as data.path")
    parser.add_argument(
        "--val-fraction", type=float, default=0.2, metavar="F", help="share held out, at least a sample (0.2)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="W", help="loader processes (0 = none)")
    parser.add_argument("--batches", type=options.count, default=64, metavar="B", help="batches of a round (64)")
    options.add_runtime(parser, threads=1)
    parser.add_argument("--repeats", type=options.count, default=3, metavar="R", help="timed rounds of each (3)")
    options.add_json(parser)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Fill the report with a row per piece of work. Raises DataError where the text cannot be read or is too short."""
    step = _step_seconds(args)
    report.notes.append(
        "tokens_per_s: the median of the rounds, each over the whole text; load: batches of one sample through the "
        "loader of training, in its order. Reading and training a tokenizer count bytes. share_of_step: what a sample "
        f"takes ÷ one step of the model of `bench train` at that context (density {_DENSITY}, {step:.3g} s)."
    )
    with runtime(args.threads, args.matmul_precision):
        for name in args.tokenizer:
            config: TokenizerConfig = Bytes() if name == "bytes" else BPE(vocab_size=args.vocab_size)
            _rows_of(name, _source(args, config), args, step, report)


def _rows_of(name: str, source: TextConfig, args: argparse.Namespace, step: float, report: Report) -> None:
    def add(work: str, packing: str | None, tokens: int, seconds: float, of_a_sample: float | None = None) -> None:
        report.rows.append(
            {
                "tokenizer": name,
                "context": args.context,
                "packing": packing,
                "workers": args.workers,
                "threads": args.threads,
                "work": work,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_s": tokens / seconds,
                "share_of_step": None if of_a_sample is None else of_a_sample / step,
                "repeats": args.repeats,
            }
        )

    documents = list(source.documents())
    size = sum(len(piece.encode("utf-8")) for document in documents for piece in document.pieces())
    if name == "bytes":
        seconds, _ = _median(args.repeats, lambda: sum(len(p) for d in source.documents() for p in d.pieces()))
        add("read", None, size, seconds)  # a byte is a token
    seconds, tokenizer = _median(1, source.build_tokenizer)
    if name != "bytes":
        add("train the tokenizer", None, size, seconds)
    seconds, (stream, _, _) = _median(args.repeats, lambda: encode_in_memory(documents, tokenizer))
    add("tokenize", None, len(stream), seconds)
    for packing in PACKINGS:
        packed = replace(source.with_tokenizer(tokenizer), pack=packing)
        module = DataModule(packed, seed=0, eval_tokens=args.context)
        samples = module.samples.train
        seconds, _ = _median(args.repeats, partial(_read_all, samples))
        add("pack", packing, len(samples) * args.context, seconds, seconds / len(samples))
        seconds = statistics.median(_loading(module, args.batches) for _ in range(args.repeats))
        add("load", packing, args.batches * args.context, seconds, seconds / args.batches)


def _source(args: argparse.Namespace, tokenizer: TokenizerConfig) -> TextConfig:
    common = {
        "context": args.context,
        "num_workers": args.workers,
        "val_fraction": args.val_fraction,
        "tokenizer": tokenizer,
    }
    return StdlibData(**common) if args.path is None else FilesData(path=args.path, **common)


def _read_all(samples: SampleSet) -> None:
    for i in range(len(samples)):
        samples[i]


def _loading(module: DataModule, batches: int) -> float:
    """Seconds for so many training batches, from the first one's arrival on: workers are started before."""
    loaded: Iterator[object] = iter(module.train_dataloader())
    next(loaded)
    start = time.perf_counter()
    for _ in islice(loaded, batches):
        pass
    return time.perf_counter() - start


def _step_seconds(args: argparse.Namespace) -> float:
    """The median step of the model that the loader feeds."""
    setup = Setup(args.context, _DENSITY, _BLOCK, "fp32", "adamw", args.threads, args.matmul_precision)
    with runtime(args.threads, args.matmul_precision):
        contender = Contender("lightsparse", setup)
        contender.step()  # builds layouts and the optimizer's state
        return _median(args.repeats, contender.step)[0]


def _median(repeats: int, call: Callable[[], T]) -> tuple[float, T]:
    """Seconds, the median of so many calls, and what the last one returned."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        found.append(time.perf_counter() - start)
    return statistics.median(found), result


def _tokenizer(text: str) -> str:
    if text not in TOKENIZERS:
        raise ValueError(f"choose from {', '.join(TOKENIZERS)}")
    return text
