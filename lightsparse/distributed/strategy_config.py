"""How a run may use its ranks: the schema of conf/strategy/, a frozen dataclass per kind with the fields it reads.

           parameters                    a sequence lies on
single     on the one rank               one rank
ddp        a replica per rank            one rank
context    a replica per rank            `context_parallel_size` ranks
fsdp       sharded over all ranks        one rank
fsdp_context  sharded over all ranks     `context_parallel_size` ranks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightsparse.context_parallel.shard import Exchange
from lightsparse.context_parallel.split import SplitKind
from lightsparse.distributed.comm_hooks import HookName, gradient_hook
from lightsparse.distributed.mesh import RankGrid


@dataclass(frozen=True)
class StrategyConfig:
    """Base of the kinds; `context_ranks` is the one thing that every kind answers."""

    kind: ClassVar[str]  # as in strategy=<kind>
    sharded: ClassVar[bool] = False  # no rank holds all parameters

    def context_ranks(self, ranks: int) -> int:
        """How many of the job's ranks hold one sequence together. Raises ValueError where they cannot."""
        return 1

    def grid(self, ranks: int) -> RankGrid:
        """Who reads which samples, and who shares a sequence. Raises ValueError as `context_ranks` does."""
        return RankGrid(ranks, self.context_ranks(ranks))


@dataclass(frozen=True)
class Single(StrategyConfig):
    kind = "single"

    def context_ranks(self, ranks: int) -> int:
        if ranks > 1:
            raise ValueError(
                f"the job has {ranks} ranks (trainer.devices × trainer.num_nodes, or those of the launcher) and "
                "strategy=single takes 1; use strategy=ddp, fsdp, context or fsdp_context"
            )
        return 1


@dataclass(frozen=True)
class SeveralRanks(StrategyConfig):
    """What all kinds for several ranks read."""

    timeout: float = 300.0  # seconds, the longest that a rank waits for the others; then the job ends

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"strategy.timeout is {self.timeout:g}; it counts seconds and must be above 0")


@dataclass(frozen=True)
class Replicas(SeveralRanks):
    """A replica of the parameters on each rank; gradients are averaged, whole or shortened by a hook."""

    comm_hook: HookName = "none"  # how gradients travel; see comm_hooks.py
    powersgd_rank: int | None = None  # rank of the two factors of a gradient; null: 4
    powersgd_start: int | None = None  # optimizer steps averaged in full before the first factored one; null: 100
    topk_share: float | None = None  # share of a gradient's entries that is sent; null: 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("powersgd_rank", "powersgd_start", "topk_share"):
            hook = name.partition("_")[0]
            if getattr(self, name) is not None and self.comm_hook != hook:
                raise ValueError(
                    f"strategy.{name} is {getattr(self, name)}, which strategy.comm_hook={self.comm_hook} does not "
                    f"read; set it to null or use strategy.comm_hook={hook}"
                )
        gradient_hook(self.comm_hook, **self.hook_options())  # for its ranges

    def hook_options(self) -> dict[str, Any]:
        """The options that are given, by the names that `gradient_hook` has for them."""
        names = ("powersgd_rank", "powersgd_start", "topk_share")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class ContextRanks(SeveralRanks):
    """What the kinds read that split a sequence over ranks."""

    context_parallel_size: int | None = None  # ranks per sequence; null: all
    split: SplitKind = "balanced"  # who holds which tokens; see context_parallel/split.py
    key_exchange: Exchange = "auto"  # how keys and values travel; see context_parallel/shard.py

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_parallel_size is not None and self.context_parallel_size < 1:
            raise ValueError(
                f"strategy.context_parallel_size is {self.context_parallel_size}; it counts ranks per sequence"
            )

    def context_ranks(self, ranks: int) -> int:
        context = ranks if self.context_parallel_size is None else self.context_parallel_size
        if ranks % context:
            raise ValueError(
                f"strategy.context_parallel_size is {context}, which does not divide the job's {ranks} ranks; "
                "change one of them, or set strategy.context_parallel_size=null for all ranks"
            )
        return context


@dataclass(frozen=True)
class DDP(Replicas):
    kind = "ddp"


@dataclass(frozen=True)
class FSDP(SeveralRanks):
    kind = "fsdp"
    sharded = True


@dataclass(frozen=True)
class Context(ContextRanks, Replicas):
    kind = "context"


@dataclass(frozen=True)
class FSDPContext(ContextRanks):
    kind = "fsdp_context"
    sharded = True
