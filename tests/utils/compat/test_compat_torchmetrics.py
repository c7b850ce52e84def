"""torchmetrics asks lightning_utilities what is installed, and imports that: what compat/torchmetrics.py relies on."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from lightsparse.utils.compat.torchmetrics import LEFT_OUT

INSTALLED = [name for name in LEFT_OUT if find_spec(name)]


def imported_by(program: str) -> set[str]:
    """Which of LEFT_OUT are there after a program."""
    program += f"\nimport sys; print(*[name for name in {LEFT_OUT} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


SOUND = f"""
import lightsparse.training
from lightning_utilities.core.imports import RequirementCache, package_available
from torchmetrics import Metric, MetricCollection
assert all(RequirementCache(name) and package_available(name) for name in {INSTALLED})
"""


@pytest.mark.multiprocess
def test_torchmetrics_alone_is_whole_and_everything_is_as_before_it() -> None:
    assert imported_by(SOUND) == set()


@pytest.mark.multiprocess
def test_by_itself_it_imports_all_that_is_installed() -> None:
    """Fails when a release has become lighter: then compat/torchmetrics.py can go."""
    assert imported_by("import torchmetrics") == set(INSTALLED)
