"""What a learned attention reports of itself, as columns of metrics.csv: its scalars, its heads, and how it changes.

Every variant names its statistics (`AttentionCore.logged`, `logged_per_head`); nothing here knows a variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightsparse.attention.router import index_churn
from lightsparse.config import Config

CHURN = "choice_churn"  # share of the chosen blocks that changed since the last validation, on the same text


def step_columns(config: Config) -> tuple[str, ...]:
    """Columns that every training step fills, in order: scalars, then one per key/value head."""
    core, kv_heads = config.attention.core, config.model.widths.kv_heads
    return (*core.logged, *(f"{name}_{head}" for name in core.logged_per_head for head in range(kv_heads)))


def columns(config: Config) -> tuple[str, ...]:
    """All columns beside metrics.COLUMNS."""
    return (*step_columns(config), *([CHURN] if config.attention.core.chooses else []))


def step_values(config: Config, stats: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The values of `step_columns` from a pass's stats, fp32 [columns]; nan where no layer reports one."""
    core, kv_heads = config.attention.core, config.model.widths.kv_heads
    missing = torch.full((1,), float("nan"), device=device)
    scalars = [stats.get(name, missing).reshape(1) for name in core.logged]
    per_head = [stats.get(name, missing).expand(kv_heads) for name in core.logged_per_head]
    return torch.cat([missing[:0], *(value.float().to(device) for value in (*scalars, *per_head))])


def churn(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """Mean over layers of how much their tables differ; None without a table before."""
    pairs = list(zip(before, after, strict=False))
    return float(torch.stack([index_churn(*pair) for pair in pairs]).mean()) if pairs else None
