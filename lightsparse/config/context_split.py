"""From a config to the split of its sequences over ranks."""

from __future__ import annotations

import math

from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.context_parallel.split import Split, split
from lightsparse.distributed.strategy_config import ContextRanks
from lightsparse.models.transformer import Transformer


def context_split(config: Config, model: Transformer) -> Split | None:
    """Which rank of a sequence holds which tokens; None where one rank holds them all. The same on all ranks.

    Raises ConfigError where a layer's attention does not know the exchange, or its blocks are too few for the ranks.
    """
    strategy, ranks = config.strategy, config.grid.context
    if not isinstance(strategy, ContextRanks) or ranks == 1:
        return None
    cores = model.cores
    for core in cores:
        ways = core.context_parallel
        if not ways or strategy.key_exchange not in ("auto", *ways):
            known = (
                f"by {' or '.join(ways)} only; use strategy.key_exchange=auto" if ways else "by none; use strategy=ddp"
            )
            raise ConfigError(
                f"strategy.key_exchange is {strategy.key_exchange}, and {type(core).__name__} can split a sequence "
                f"over ranks {known}"
            )
    length, unit = config.data.context, math.lcm(*(core.split_granularity() for core in cores))
    loads = None
    if strategy.split == "balanced":
        loads = [sum(of_unit) for of_unit in zip(*(core.row_costs(length, unit) for core in cores), strict=True)]
    try:
        return split(strategy.split, length, unit, ranks, loads)
    except ValueError as error:
        raise ConfigError(str(error)) from error
