"""What a learned attention reports of itself, as columns of metrics.csv: its scalars, its heads, and how it changes.

Every variant names its statistics (`AttentionCore.logged`, `logged_per_head`); nothing here knows a variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightsparse.attention.selection.router import index_churn
from lightsparse.config.schema import Config
from lightsparse.training.measures.scores import COLUMNS as SCORES

CHURN = "choice_churn"  # share of the chosen blocks that changed since the last validation, on the same text


def step_columns(config: Config) -> tuple[str, ...]:
    """Columns that every training step fills, in order: scalars, then one per key/value head."""
    core, kv_heads = config.attention.core, config.model.widths.kv_heads
    return (*core.logged, *(f"{name}_{head}" for name in core.logged_per_head for head in range(kv_heads)))


def columns(config: Config) -> tuple[str, ...]:
    """All columns beside metrics.COLUMNS."""
    scores = SCORES if config.data.has_answers else ()
    return (*scores, *step_columns(config), *([CHURN] if config.attention.core.selects_from_input else []))


def step_values(config: Config, stats: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The values of `step_columns` from a pass's stats, fp32 [columns]; nan where no layer reports one."""
    core, kv_heads = config.attention.core, config.model.widths.kv_heads
    missing = torch.full((1,), float("nan"), device=device)
    scalars = [stats.get(name, missing).reshape(1) for name in core.logged]
    per_head = [stats.get(name, missing).expand(kv_heads) for name in core.logged_per_head]
    return torch.cat([missing[:0], *(value.float().to(device) for value in (*scalars, *per_head))])


def overlaps(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor | None:
    """Entries that both tables of a layer hold, and that either does: fp32 [layers, 2]; None without a table before.

    They add up over ranks, whether these hold different samples or different rows of one; a share does not.
    """
    pairs = []
    for old, new in zip(before, after, strict=False):
        entries = (old >= 0).sum() + (new >= 0).sum()  # common + union
        union = entries / (2 - index_churn(old, new))
        pairs.append(torch.stack([entries - union, union]))
    return torch.stack(pairs).float() if pairs else None


def churn(overlaps: Tensor) -> float:
    """Mean over layers of how much their tables differ, from `overlaps`."""
    return float((1 - overlaps[:, 0] / overlaps[:, 1]).mean())
