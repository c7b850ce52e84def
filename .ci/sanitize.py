"""The native kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer, and the proof that these notice.

The proof: faults planted one at a time in copies of the kernel, each of which must end its process with a report. Needs
g++ with its sanitizers and the test extra; a minute and a half on two cores.

    python .ci/sanitize.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL = ROOT / "lightsparse" / "kernels" / "native"
FLAGS = "-g -fsanitize=address,undefined -fno-sanitize-recover=all"
PRELOADED = ("libasan.so", "libstdc++.so.6")
TIME_LIMIT = 900  # seconds per process

EDGE = "test_what_is_skipped_beside_an_edge_is_hidden"
TESTS = [  # every way through the kernel at odd sizes, with one thread and with several
    "test_any_head_dim",
    "test_blocks_larger_than_the_tiles_of_the_kernel[7-300]",
    "test_dropout_decides_bit_by_bit_as_keep_scale_does",
    "test_two_threads_repeat_their_bits_and_agree_with_one",
    "test_no_queries_and_no_keys",
    "test_decoding_one_query_gives_the_row_of_the_whole",
    *(f"{EDGE}[{case}]" for case in ("documents of both sides-7-20", "neighbours-64-64", "window-100-48")),
    "test_bf16_with_dropout_and_bias_is_fp32_but_for_rounding",
    "test_rows_of_single_queries_by_key_block",
    "test_more_rows_than_a_portion_holds",
]


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    text: str
    planted: str
    report: str


FAULTS = [
    Fault("a read behind a tensor", "pack.h", "a.kv_block, a.Nkv}", "a.kv_block, a.Nkv + 16}", "READ of size"),
    Fault("a write behind a tensor", "rows.h", "*to = (float *)base", "*to = 1 + (float *)base", "WRITE of size"),
    Fault(
        "a write behind a piece of the workspace",
        "call.h",
        "s.pos = arena.take<int32_t>(rows_at_once)",
        "s.pos = arena.take<int32_t>(rows_at_once - 1)",
        "use-after-poison",
    ),
    Fault("an overflow", "pack.h", "a.kv_block, a.Nkv}", "a.kv_block, a.Nkv * INT64_MAX}", "signed integer overflow"),
]

ALONE = "import os, sys; del os.environ['LD_PRELOAD']\n"  # the compiler that this process starts needs no sanitizer
RUN_TESTS = ALONE + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
RUN_FAULT = (
    ALONE
    + """
import pathlib, torch
from lightsparse.kernels import block_sparse_attention
from lightsparse.kernels.native import build
from lightsparse.patterns import LocalWindow
build.SOURCE = pathlib.Path(sys.argv[1])
q, k, v = torch.randn(3, 1, 2, 70, 32).unbind()
layout = LocalWindow(40).layout(70, block=24)
block_sparse_attention(q, k.requires_grad_(), v, layout, backend="native").sum().backward()
"""
)


def sanitized(program: str, *arguments: str, optimised: str) -> tuple[int, str]:
    """Status and output of a Python program whose native kernel is sanitized."""
    # The sanitizer comes first, and the C++ library so that it finds what throws. Python itself leaks a little.
    libraries = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in PRELOADED]
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "CXX": "g++"}
    environment |= {"LIGHTSPARSE_CXXFLAGS": f"{optimised} {FLAGS}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIME_LIMIT,
        check=False,
    )
    return done.returncode, done.stdout


def run_tests() -> str | None:
    """What is wrong, if anything."""
    names = [f"tests/kernels/test_kernels_native.py::{test}" for test in TESTS]
    status, output = sanitized(RUN_TESTS, "-n", "0", "-p", "no:cacheprovider", *names, optimised="-Og")
    say(output)
    return f"the tests end with status {status}" if status else None


def run_fault(fault: Fault, folder: Path) -> str | None:
    """What is wrong, if anything."""
    shutil.copytree(KERNEL, folder)
    file = folder / fault.file
    text = file.read_text()
    if text.count(fault.text) != 1:
        return f"{fault.what} cannot be planted: {fault.file} must have {fault.text!r} once"
    file.write_text(text.replace(fault.text, fault.planted))
    status, output = sanitized(RUN_FAULT, str(folder / "native.cpp"), optimised="-O0")
    if not status or fault.report not in output:
        return f"{fault.what} goes unnoticed (status {status}):\n{output}"
    say(f"{fault.what}: noticed ({fault.report})\n")
    return None


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        os.environ["LIGHTSPARSE_CACHE"] = str(Path(temporary, "cache"))
        jobs = [pool.submit(run_tests)]
        jobs += [pool.submit(run_fault, fault, Path(temporary, str(i))) for i, fault in enumerate(FAULTS)]
        wrong = [problem for job in jobs if (problem := job.result())]
    say("\n".join(wrong) + "\n" if wrong else "the sanitizers find nothing, and every planted fault\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
