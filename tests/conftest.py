"""How the tests run: on all cores where all of them run, and with the table of variant × property at the end."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whomever

from collections.abc import Callable, Iterator

import pytest
import torch

pytest_plugins = ["tiny_run"]  # fixtures of a run that takes a second

_RESULTS: dict[tuple[str, str], list[str]] = {}
_BATTERY = "battery"  # the name under which a report carries its variant and property from a worker
_MOST_WORKERS = 8

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the others have the other cores


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker per core for the whole suite; for named files or tests none: it would start later than they end."""
    if config.invocation_params.args and any(not arg.startswith("-") for arg in config.invocation_params.args):
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_WORKERS)


@pytest.fixture(autouse=True)
def matmul_precision() -> Iterator[None]:
    """Runs set it for their process; where the CPU has AMX the tests after them would multiply in bf16."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """A run sets variables of its process (ranks, threads); programs that later tests start must not get them."""
    before, folder = dict(os.environ), os.getcwd()
    yield
    for name in os.environ.keys() - before.keys():
        if not name.startswith("PYTEST_"):
            del os.environ[name]
    os.environ.update(before)
    os.chdir(folder)


@pytest.fixture
def battery_result(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Called with (variant, property), puts this test's outcome into the table."""

    def note(variant: str, property: str) -> None:
        record_property(_BATTERY, (variant, property))

    return note


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for name, cell in report.user_properties:
            if name == _BATTERY:
                _RESULTS.setdefault(tuple(cell), []).append(report.outcome)  # type: ignore[arg-type]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _RESULTS:
        return
    variants = list(dict.fromkeys(variant for variant, _ in _RESULTS))
    properties = list(dict.fromkeys(property for _, property in _RESULTS))
    terminalreporter.section("variant × property")
    width = max(map(len, properties)) + 2
    terminalreporter.write_line(" " * width + "  ".join(variants))
    for property in properties:
        cells = (_cell(variant, property).ljust(len(variant)) for variant in variants)
        terminalreporter.write_line(property.ljust(width) + "  ".join(cells))
    terminalreporter.write_line(
        "–: left out, because the core declares that it cannot and refuses it (or not selected by -k)"
    )


def _cell(variant: str, property: str) -> str:
    outcomes = _RESULTS.get((variant, property))
    if outcomes is None:
        return "–"
    return "ok" if set(outcomes) == {"passed"} else "FAILED"
