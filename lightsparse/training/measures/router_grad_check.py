"""Does what chooses the blocks learn? A router that gets no gradient stays as it was drawn, and nothing else says so.

A choice without parameters (MoBA) has nothing to learn by design and is not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightsparse.attention.core import AttentionCore

log = logging.getLogger(__name__)

STEPS = 10  # in all of which the gradient has to be exactly zero


class RouterWatch:
    """Warns once, after the first STEPS steps of a start, about layers whose router got no gradient in any of them."""

    def __init__(self, cores: Iterable[AttentionCore]):
        self.routers = {
            core.shape.layer: core
            for core in cores
            if any(parameter.requires_grad for parameter in core.selector_parameters())
        }
        self.left = STEPS if self.routers else 0
        self.totals: Tensor | None = None  # [routers]: sum of |gradient| on this rank

    def look(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """To be called at every step, on all ranks, once the gradients are there. over_ranks: the sum over all."""
        if not self.left:
            return
        self.left -= 1
        sizes = torch.stack([_size(core) for core in self.routers.values()])
        self.totals = sizes if self.totals is None else self.totals + sizes
        if self.left:
            return
        silent = [
            layer for layer, total in zip(self.routers, over_ranks(self.totals).tolist(), strict=True) if not total
        ]
        if silent:
            log.warning(
                "the router has received no gradient in %d steps, in layers %s: what it chooses is chance; train it "
                "through its bias or a loss of its own, or take an attention that needs no router",
                STEPS,
                silent,
            )


def _size(core: AttentionCore) -> Tensor:
    """Sum of |gradient| over the selection's parameters here, fp32 scalar."""
    parameters = core.selector_parameters()
    total = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            total = total + (grad.to_local() if isinstance(grad, DTensor) else grad).abs().sum().float()
    return total
