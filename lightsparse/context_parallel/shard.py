"""This rank's part of a sequence that several ranks hold together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightsparse.context_parallel.split import Split
from lightsparse.utils.rank_errors import ranks_named

Exchange = Literal["auto", "sparse", "ring", "gather"]
T = TypeVar("T")


@dataclass
class Traffic:
    """Bytes of rows and requests that this rank has sent to others, by what they were; sums of scalars do not count."""

    sent: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int) -> None:
        self.sent[what] = self.sent.get(what, 0) + count


class Plans:
    """What was worked out for an object (a layout, say), kept for as long as the object lives.

    What is kept must not hold the object itself.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()

    def get(self, owner: Any, key: Hashable, make: Callable[[], T]) -> T:
        """What make() gave for this owner and key the first time."""
        kept = self._of.setdefault(owner, {})
        if key not in kept:
            with torch.inference_mode(False):  # first made in an evaluation, it must serve training too
                kept[key] = make()
        return kept[key]

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._of.values())


@dataclass(frozen=True, eq=False)
class ContextShard:
    """One rank's place in a context group. Tensors of the sequence hold the tokens `tokens`, in this order.

    split     who holds what
    group     the ranks of the sequence; its rank r holds split.tokens(r), and its timeout ends every wait
    exchange  how keys and values travel: sparse (the blocks that rows name, once), ring (all of them, one rank's at a
              time), gather (all of them at once); auto is sparse, unless some rank would hold many ranks' keys at once
              and the variant can use the ring
    """

    split: Split
    group: dist.ProcessGroup
    exchange: Exchange = "auto"
    timeout: float | None = None  # seconds, that of the group, for its error messages
    traffic: Traffic = field(default_factory=Traffic)
    plans: Plans = field(default_factory=Plans)

    @cached_property
    def rank(self) -> int:
        """Within the group."""
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return self.split.world

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.split.length

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [n], ascending, on the CPU."""
        return self.split.tokens(self.rank)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a tensor over the whole sequence."""
        first, last = int(self.tokens[0]), int(self.tokens[-1])
        if last - first + 1 == len(self.tokens):
            return x.narrow(dim, first, len(self.tokens))
        return x.index_select(dim, self.tokens.to(x.device))

    def __post_init__(self) -> None:
        if self.exchange not in get_args(Exchange):
            raise ValueError(
                f"strategy.key_exchange is {self.exchange!r}; it must be one of {', '.join(get_args(Exchange))}"
            )
        ranks = dist.get_world_size(self.group)
        if ranks != self.split.world:
            raise ValueError(f"the sequence is split over {self.split.world} ranks and the group has {ranks}")


@torch.compiler.disable
def sum_over(x: Tensor, shard: ContextShard) -> Tensor:
    """The sum of x over the group, on every rank; differentiable: a gradient is summed over the group, too."""
    return _SumOver.apply(x, shard)


def most_over(x: float, shard: ContextShard, device: torch.device) -> float:
    """The largest x of the group, on every rank; device: one that the group can send from."""
    return float(_reduced(torch.tensor([x], device=device), shard, dist.ReduceOp.MAX))


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shard: ContextShard) -> Tensor:
        ctx.shard = shard
        return _reduced(x.detach(), shard, dist.ReduceOp.SUM)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _reduced(grad, ctx.shard, dist.ReduceOp.SUM), None


def _reduced(x: Tensor, shard: ContextShard, how: dist.ReduceOp.RedOpType) -> Tensor:
    total = x.contiguous().clone()
    with ranks_named(shard.timeout):
        dist.all_reduce(total, how, group=shard.group)
    return total
