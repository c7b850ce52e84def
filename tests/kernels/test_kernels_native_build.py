"""The compiled kernel's build, its load, and what becomes of its errors."""

import ctypes
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import Sizes, Tables, inputs, random_layout

from lightsparse.kernels import block_sparse_attention
from lightsparse.kernels.native import build, call
from lightsparse.patterns import LocalWindow


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache, and a library that has not been asked for yet."""
    monkeypatch.setenv("LIGHTSPARSE_CACHE", str(tmp_path / "cache"))
    build.library.cache_clear()
    yield tmp_path / "cache"
    build.library.cache_clear()


def quick_source(argument_bytes: int = ctypes.sizeof(build.Arguments)) -> str:
    returned = {"native_run": 0, "native_workspace": 7, "native_argument_bytes": argument_bytes}
    return "".join(f'extern "C" long {name}() {{ return {number}; }}' for name, number in returned.items())


@pytest.fixture
def source(monkeypatch, tmp_path) -> Path:
    """In place of the kernel, which compiles for seconds."""
    source = tmp_path / "native.cpp"
    source.write_text(quick_source())
    monkeypatch.setattr(build, "SOURCE", source)
    return source


def test_a_second_load_compiles_nothing(cache, source):
    built = build.build()
    assert built.parent == cache and [file.name for file in cache.iterdir()] == [built.name]
    before = built.stat().st_mtime_ns
    assert build.build() == built and built.stat().st_mtime_ns == before
    assert build.load(built).native_workspace(None, 0, None, 0) == 7


def test_another_source_header_or_flag_is_another_file(cache, source, monkeypatch):
    built = [build.build()]
    for name, text in {"native.cpp": quick_source() + " ", "a.h": "", "b.h": "", "c.h": "// text"}.items():
        (source.parent / name).write_text(text)
        built.append(build.build())
    (source.parent / "a.h").write_text("// text")
    built.append(build.build())
    monkeypatch.setenv("LIGHTSPARSE_CXXFLAGS", "-O1 -DNAME='two words'")
    built.append(build.build())
    assert len(set(built)) == len(built) == 7


def test_every_header_is_part_of_the_name_and_of_the_kernel():
    """What is hashed is native.cpp and *.h beside it: nothing else is included, and no header there lies idle."""
    folder = build.SOURCE.parent
    headers = {path.name for path in folder.glob("*.h")}
    sources = [build.SOURCE, *folder.glob("*.h")]
    assert {name for path in sources for name in re.findall(r'#include "(.*)"', path.read_text())} == headers
    assert not list(folder.glob("**/*.hpp")) and len(list(folder.glob("*.cpp"))) == 1


def test_fp16_arithmetic_compiles_even_where_the_cpu_has_none(cache, compiler, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(build, "_cpu_flags", lambda: frozenset({"avx512_fp16"}))
    monkeypatch.setenv("LIGHTSPARSE_CXXFLAGS", "-O0")
    assert build.build(compiler).exists()


def test_another_instruction_set_is_another_file(cache, source, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    plain = build.build()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert build.build() != plain


@pytest.mark.parametrize("compiler_knows", [True, False])
@pytest.mark.parametrize("cpu_knows", [True, False])
def test_fp16_arithmetic_is_compiled_only_where_cpu_and_compiler_know_it(cpu_knows, compiler_knows, monkeypatch):
    def of_compiler(*command):
        if not compiler_knows:
            raise build.BuildError("unrecognized command-line option")
        return ""

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(build, "_cpu_flags", lambda: frozenset({"avx512_fp16"} if cpu_knows else ()))
    monkeypatch.setattr(build, "_output", of_compiler)
    assert ("-mavx512fp16" in build._instructions("c++")) == (cpu_knows and compiler_knows)


@pytest.mark.multiprocess
def test_two_processes_may_build_at_once(cache, source):
    program = (
        "import sys, pathlib; from lightsparse.kernels.native import build\n"
        "build.SOURCE = pathlib.Path(sys.argv[1])\n"
        "print(build.load(build.build()).native_workspace(None, 0, None, 0))"
    )
    command = [sys.executable, "-c", program, str(source)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["7", "7"]
    assert len(list(cache.iterdir())) == 1


def served_without_kernel(caplog) -> list[str]:
    """Warnings of three calls, which must all be served all the same."""
    sizes = Sizes(dim=16)
    layout = LocalWindow(20).layout(63, block=16)
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        for _ in range(3):
            assert block_sparse_attention(*inputs(sizes), layout).isfinite().all()
    with pytest.raises(ValueError, match='backend "native" could not be built here'):
        block_sparse_attention(*inputs(sizes), layout, backend="native")
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_a_compiler_blocked_serves_and_says_so_once(cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (said,) = served_without_kernel(caplog)
    assert "no C++ compiler (no-such-compiler) is on the path" in said and "blocked" in said


def test_a_build_that_fails_is_said_once_with_its_reason(cache, source, caplog):
    source.write_text("this is no C++")
    (said,) = served_without_kernel(caplog)
    assert "ends with status 1" in said and "error" in said


def test_a_file_in_the_cache_that_does_not_load_is_no_crash(cache, source, caplog):
    build.build().write_bytes(b"nothing")
    (said,) = served_without_kernel(caplog)
    assert "does not load" in said


def test_other_arguments_than_python_passes_are_refused_at_load(cache, source, caplog):
    source.write_text(quick_source(argument_bytes=8))
    (said,) = served_without_kernel(caplog)
    assert f"the kernel's arguments have 8 bytes and build.Arguments {ctypes.sizeof(build.Arguments)}" in said


def test_a_library_without_the_functions_is_refused_at_load(cache, source, caplog):
    source.write_text('extern "C" long native_run() { return 0; }')
    (said,) = served_without_kernel(caplog)
    assert "does not load" in said and "native_workspace" in said


def test_a_cache_that_cannot_be_written_to_is_no_crash(cache, source, caplog, monkeypatch):
    monkeypatch.setenv("LIGHTSPARSE_CACHE", "/proc/nowhere")
    (said,) = served_without_kernel(caplog)
    assert "set LIGHTSPARSE_CACHE" in said


def test_a_read_only_home_builds_among_the_temporary_files(source, monkeypatch, tmp_path):
    for name, value in {"HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("LIGHTSPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    built = build.build()
    assert built.is_relative_to(tmp_path) and built.parent.stat().st_mode & 0o077 == 0


def test_the_kernel_is_available_here():
    assert call.available()


# ---- exceptions in the kernel ---------------------------------------------------------------------------------------

_FAULTS = """
#include <new>
#include <stdexcept>
extern "C" { int fault_thread = -1, fault = 0; }
inline void fail(int me) {
  if (me != fault_thread) return;
  if (fault == 0) throw std::bad_alloc();
  if (fault == 1) throw std::runtime_error("planted");
  throw 7;
}
#define IN_EACH_THREAD(me) fail(me);
"""
_NO_FAULT = -1


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The kernel with a switch: faulty(thread, kind) lets that thread throw from then on."""
    folder = tmp_path_factory.mktemp("faulty")
    header = folder / "faults.h"
    header.write_text(_FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTSPARSE_CACHE", str(folder))
        patch.setenv("LIGHTSPARSE_CXXFLAGS", f"-O0 -include {header}")
        library = build.load(build.build())
        patch.setattr(build, "library", lambda: library)

        def choose(thread: int, kind: int = 0) -> None:
            ctypes.c_int.in_dll(library, "fault_thread").value = thread
            ctypes.c_int.in_dll(library, "fault").value = kind

        yield choose


@pytest.mark.parametrize("thread", [0, 1])
@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [(0, MemoryError, "found no memory"), (1, RuntimeError, "failed: planted"), (2, RuntimeError, "no std::exception")],
)
def test_an_exception_in_any_thread_is_an_error_in_python(faulty, thread, kind, error, text, threads):
    threads(2)
    sizes = Sizes(1, 4, 2, nq=200, nkv=200, dim=32)
    q, k, v = inputs(sizes)
    layout = random_layout(sizes, Tables(1, 2, 32, 16, most=8))

    def forward() -> torch.Tensor:
        out = block_sparse_attention(q, k, v, layout, backend="native")
        assert isinstance(out, torch.Tensor)
        return out

    faulty(_NO_FAULT)
    out = forward()
    for attempt in (forward, lambda: out.sum().backward()):
        faulty(thread, kind)
        with pytest.raises(error, match=text):
            attempt()
        faulty(_NO_FAULT)
        assert torch.equal(forward(), out)
