"""The compiled kernel: built on first use with the C++ compiler at hand, kept in the user's cache, loaded by ctypes.

The file's name is a hash of the sources, the compiler's version and the flags, among them the instruction set, so a
cache that several machines share never hands one machine the code of another.
$LIGHTSPARSE_CXXFLAGS adds flags, as .ci/sanitize.py does.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")  # it includes the headers beside it
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_INSTRUCTIONS = {  # by what PyTorch says the CPU can do; anything else gets the compiler's default
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
_FP16 = "-mavx512fp16"
_TIMEOUT = 300  # seconds; a build takes a few
_lock = threading.Lock()

_STRIDES = ctypes.c_int64 * 3
_WHOLE = "B H Hkv Nq Nkv D table_batch table_heads NQ K q_block kv_block dense_count bf16 threads"
_REST = (
    "out dq dk dv lse dlse table dense_row q_pos visible_from visible_until q_doc kv_doc "
    "q_pos_b from_b until_b q_doc_b kv_doc_b bias bias_b bias_h bias_group dbias drop_keys key_ids drop_below"
)


class Arguments(ctypes.Structure):
    """`Args` of arguments.h, field by field: sizes, then addresses (0 = none) and strides in elements."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _WHOLE.split()),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ["q", "k", "v", "out_saved", "dout"]),
        *((name, _STRIDES) for name in ["sq", "sk", "sv", "sdo"]),
        *((name, ctypes.c_int64) for name in _REST.split()),
        ("keep", ctypes.c_double),
        ("work", ctypes.c_int64),
    )


class BuildError(RuntimeError):
    """The kernel cannot be built or loaded here; the message is the reason."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded kernel, built if need be; None where that fails, and then the reason is logged, once."""
    with _lock:
        try:
            return load(build())
        except BuildError as error:
            log.warning("attention on CPU runs without its compiled kernel (backend blocked serves): %s", error)
            return None


def build(compiler: str | None = None) -> Path:
    """The shared library's path, compiled unless the cache has it. Raises BuildError.

    compiler: a program; default $CXX, else g++, c++ or clang++, whichever is found first
    """
    program = compiler or os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if program is None or shutil.which(program) is None:
        raise BuildError(f"no C++ compiler ({program or 'g++, c++, clang++'}) is on the path")
    version = _output(program, "--version")
    flags = (*_FLAGS, *_instructions(program), *shlex.split(os.environ.get("LIGHTSPARSE_CXXFLAGS", "")))
    sources = (part for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))) for part in (path.name, path.read_text()))
    named = hashlib.sha256("\0".join((version, *flags, *sources)).encode()).hexdigest()[:24]
    for folder in _folders():
        built = folder / f"native-{named}.so"
        if built.exists():
            return built
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:
                made = Path(aside, built.name)
                log.info("compiling the attention kernel into %s (a few seconds, once)", built)
                _output(program, *flags, str(SOURCE), "-o", str(made))
                made.replace(built)  # atomic: another process sees the whole file or none
            return built
        except OSError as error:  # a home that cannot be written to
            log.info("cannot write to %s (%s)", folder, error.strerror)
    raise BuildError("no folder for the compiled kernel can be written to; set LIGHTSPARSE_CACHE to one that can")


def _instructions(program: str) -> tuple[str, ...]:
    """The compiler's flags for what the CPU can do, fp16 arithmetic included where both know it."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _INSTRUCTIONS.get(capability, ())
    if capability == "AVX512" and "avx512_fp16" in _cpu_flags():
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BuildError):
            empty = Path(folder, "empty.cpp")
            empty.touch()
            _output(program, _FP16, "-fsyntax-only", str(empty))
            return (*flags, _FP16)
    return flags


def _cpu_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    return frozenset(path.read_text().split("\n\n")[0].split()) if path.exists() else frozenset()


def load(path: Path) -> ctypes.CDLL:
    """Raises BuildError."""
    try:
        loaded = ctypes.CDLL(str(path))
        functions = loaded.native_run, loaded.native_workspace, loaded.native_argument_bytes
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} does not load: {error}") from error
    for function in functions:
        function.restype = ctypes.c_int64
    for function in functions[:2]:  # the text of an error goes to the third argument, which has so many bytes
        function.argtypes = (ctypes.POINTER(Arguments), ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)
    if (size := loaded.native_argument_bytes()) != ctypes.sizeof(Arguments):
        raise BuildError(
            f"the kernel's arguments have {size} bytes and build.Arguments {ctypes.sizeof(Arguments)}; "
            "arguments.h and build.py must list the same fields"
        )
    return loaded


def _folders() -> list[Path]:
    """Where to look and build, in order: the cache, and a folder of this user's own among the temporary files."""
    if chosen := os.environ.get("LIGHTSPARSE_CACHE"):
        return [Path(chosen)]
    folders = []
    if cache := os.environ.get("XDG_CACHE_HOME"):
        folders.append(Path(cache))
    elif Path("~").expanduser() != Path("~"):
        folders.append(Path("~/.cache").expanduser())
    return [folder / "lightsparse" / "native" for folder in folders] + _own_temporary_folder()


def _own_temporary_folder() -> list[Path]:
    """Code is loaded from it, so it must be nobody else's."""
    folder = Path(tempfile.gettempdir(), f"lightsparse-native-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        held = folder.lstat()
    except OSError:
        return []
    return [folder] if held.st_uid == os.getuid() and not held.st_mode & 0o022 and not folder.is_symlink() else []


def _output(*command: str) -> str:
    """What a program prints. Raises BuildError when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr.strip()[:200])
        raise BuildError(f"{command[0]} ends with status {done.returncode}: {reason}")
    return done.stdout
