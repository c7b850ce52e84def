from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="the backend needs the package triton, which is for Linux")

from interpreted import as_hardware


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    as_hardware(monkeypatch)
    yield
