"""Which code trains: the versions that decide what a step computes."""

from __future__ import annotations

import importlib.metadata
import subprocess
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(maxsize=1)
def code_version() -> dict[str, str]:
    """lightsparse's version, with its commit where it runs from a checkout ("+changes" with edits), and torch's."""
    return {"lightsparse": importlib.metadata.version("lightsparse") + _commit(), "torch": str(torch.__version__)}


def _commit() -> str:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    words = ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        git = subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git: the version alone has to tell
        return ""
    return f" at {git.stdout.strip()}" if git.returncode == 0 else ""
