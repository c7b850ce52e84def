"""How the tests run: on all cores where all of them run, and with the table of variant × property at the end."""

from __future__ import annotations

import os
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
    """What a test leaves in the environment, or its folder, would be that of all programs that later tests start."""

    def state() -> dict[str, str]:
        return {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")} | {
            "cwd": os.getcwd()
        }

    before = state()
    yield
    after = state()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    for name in changed - {"cwd"}:
        os.environ.pop(name, None)
        os.environ |= {name: before[name]} if name in before else {}
    os.chdir(before["cwd"])
    assert not changed, f"the test has changed {sorted(changed)}: { ({name: after.get(name) for name in changed}) }"


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
