"""The battery's table, printed at the end: variant × property, each passed, FAILED, or the capability it lacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_RESULTS: dict[tuple[str, str], list[str]] = {}
_OF_TEST: dict[str, tuple[str, str]] = {}


@pytest.fixture
def battery_result(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Called with (variant, property), puts this test's outcome into the table."""

    def note(variant: str, property: str) -> None:
        _OF_TEST[request.node.nodeid] = (variant, property)

    return note


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.nodeid in _OF_TEST:
        _RESULTS.setdefault(_OF_TEST[report.nodeid], []).append(report.outcome)


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
