"""Whether a checkpoint is finite: one NaN in an embedding spreads over every later step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_CHECKED = ("state_dict", "optimizer_states")  # what training resumes from; losses elsewhere may be NaN by definition


def not_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """The first weight or optimizer state of a checkpoint that holds NaN or infinity, in words; None if none does.

    Tensors are looked at one by one: of a mapped file no more than one need be in memory.
    """
    for part in _CHECKED:
        for name, value in _tensors(checkpoint.get(part), part):
            if value.is_floating_point() and value.numel() and not bool(torch.isfinite(value.sum())):
                wrong = int((~torch.isfinite(value)).sum())  # a sum may overflow where no entry is wrong
                if wrong:
                    return f"{wrong} of {value.numel()} numbers in {name} are NaN or infinite"
    return None


def _tensors(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _tensors(value, f"{name}[{index}]")
