"""The generators of a process, for a checkpoint. Our own randomness needs none of them; a user's callbacks may.

As lists and plain numbers, which a checkpoint may hold that is loaded with weights_only.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Python's, NumPy's, PyTorch's and, where there is a device, its generators."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)  # the other form is a dict
    kind, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from where `random_state` was taken; devices that it did not see keep their own state."""
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(saved.cpu(), device)
