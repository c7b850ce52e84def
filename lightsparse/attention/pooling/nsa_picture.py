"""The three branches of NSA as one layout over tokens and summaries: for pictures, not for kernels."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.patterns import BlockLayout
from lightsparse.patterns.mask import ALWAYS


def together(selected: BlockLayout, window: BlockLayout, summaries: BlockLayout | None) -> BlockLayout:
    """A row per query: its blocks of tokens, those of two branches twice, and its blocks of summaries behind them.

    selected   a row per query
    window     of all queries, in blocks as large as the selection's
    summaries  with as many of them to a block; None where there are none
    """
    block, n = selected.kv_block, selected.num_keys
    blocks = -(-n // block)
    tables = [selected.kv_indices, _per_query(window, block)]
    mask = selected.mask
    if summaries is not None:
        behind = _per_query(summaries, block)
        tables.append(torch.where(behind < 0, -1, behind + blocks))
        padding = blocks * block - n

        def joined(of_tokens: Tensor, of_summaries: Tensor) -> Tensor:
            of_tokens = F.pad(of_tokens, (0, padding), value=ALWAYS)
            batch = max(len(of_tokens), len(of_summaries))
            return torch.cat([of_tokens.expand(batch, -1), of_summaries.expand(batch, -1)], 1)

        mask = replace(
            mask,
            visible_from=joined(mask.visible_from, summaries.mask.visible_from),
            visible_until=joined(mask.visible_until, summaries.mask.visible_until),
            kv_doc=None
            if mask.kv_doc is None or summaries.mask.kv_doc is None
            else joined(mask.kv_doc, summaries.mask.kv_doc),
            num_tokens=n,
        )
    batch, heads = (max(table.shape[axis] for table in tables) for axis in (0, 1))
    table = torch.cat([table.expand(batch, heads, -1, -1) for table in tables], -1)
    last = torch.iinfo(torch.int32).max
    table = table.masked_fill(table < 0, last).sort(-1).values
    return replace(selected, kv_indices=table.masked_fill(table == last, -1), mask=mask)


def _per_query(layout: BlockLayout, block: int) -> Tensor:
    """The table with a row for each query."""
    rows = torch.arange(layout.num_queries, device=layout.kv_indices.device) // layout.q_block
    assert layout.kv_block == block
    return layout.kv_indices[:, :, rows]
