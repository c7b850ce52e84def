"""How much of a long walk is worked on at once: little where caches are, much where every operation is a launch.

On a CPU a chunk should stay in the processor's cache, and reading a value to save work costs nothing. On CUDA an
operation costs microseconds whatever its size, and reading a value waits for everything before it: chunks are as large
as memory allows, and nothing depends on a value where a bound known from the shapes does.
"""

from __future__ import annotations

import torch


def is_wide(device: torch.device) -> bool:
    """Whether chunks are large and no value is read on the way: on every device but the CPU."""
    return device.type != "cpu"


def at_once(device: torch.device, cached: int, wide: int) -> int:
    """Numbers to work on at once: `cached` on a CPU, `wide` elsewhere."""
    return wide if is_wide(device) else cached
