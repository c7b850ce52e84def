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

BUILD = """
import pathlib, sys
from lightsparse.kernels.native import build
build.SOURCE = pathlib.Path(sys.argv[1])
build.build()
"""
CALL = (
    BUILD
    + """
import torch
from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import LocalWindow
q, k, v = torch.randn(3, 1, 2, 70, 32).unbind()
layout = LocalWindow(40).layout(70, block=24)
block_sparse_attention(q, k.requires_grad_(), v, layout, backend="native").sum().backward()
"""
)


def python(*arguments: str, sanitized: bool, flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CXX": "g++", "LIGHTSPARSE_CXXFLAGS": f"{flags} {FLAGS}", "PYTHONPATH": str(ROOT)}
    if sanitized:  # the sanitizer comes first, and the C++ library so that it finds what throws
        libraries = (library("libasan.so"), library("libstdc++.so.6"))
        environment |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}  # Python leaves some
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIME_LIMIT,
        check=False,
    )


def library(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


def run_tests() -> str | None:
    """What is wrong, if anything."""
    flags = "-Og"
    built = python("-c", BUILD, str(KERNEL / "native.cpp"), sanitized=False, flags=flags)
    if built.returncode:
        return f"the kernel does not build with sanitizers:\n{built.stdout}"
    names = [f"tests/kernels/test_kernels_native.py::{test}" for test in TESTS]
    done = python("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *names, sanitized=True, flags=flags)
    say(done.stdout)
    return f"the tests end with status {done.returncode}" if done.returncode else None


def run_fault(fault: Fault, folder: Path) -> str | None:
    flags = "-O0"
    shutil.copytree(KERNEL, folder)
    file = folder / fault.file
    text = file.read_text()
    if text.count(fault.text) != 1:
        return f"{fault.what} cannot be planted: {fault.file} must have {fault.text!r} once"
    file.write_text(text.replace(fault.text, fault.planted))
    source = str(folder / "native.cpp")
    built = python("-c", BUILD, source, sanitized=False, flags=flags)
    done = python("-c", CALL, source, sanitized=True, flags=flags)
    if built.returncode or not done.returncode or fault.report not in done.stdout:
        return f"{fault.what} goes unnoticed (status {done.returncode}):\n{built.stdout}{done.stdout}"
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
