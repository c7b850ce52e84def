"""What compat/datasets.py names is what `datasets` uses."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pytest

from lightsparse.utils.compat.datasets import READERS_LOGGER, is_offline


def test_readers_log_below_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    watch = logging.Handler()
    monkeypatch.setattr(watch, "emit", lambda record: said.append(record.name))
    logger = logging.getLogger(READERS_LOGGER)
    monkeypatch.setattr(logger, "handlers", [watch])
    monkeypatch.setattr(logger, "propagate", False)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        broken = tmp_path / "broken.jsonl"
        broken.write_text('{"text": "whole"}\n{"text": \n')
        with pytest.raises(Exception):  # whichever it is: data/files.py puts it in words
            list(datasets.load_dataset("json", data_files=[str(broken)], split="train", streaming=True))
    finally:
        logger.setLevel(level)
    assert said and all(name.startswith(f"{READERS_LOGGER}.") for name in said)


@pytest.mark.parametrize("offline", [True, False])
def test_offline_is_what_datasets_goes_by(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    assert is_offline() == offline
