"""What one call of the multihead drop-in may read: PyTorch's masks and extra keys put into a BlockLayout.

Padding and causality become visibility intervals, which cost nothing; only other masks stay explicit. What is built
depends on values, so none of this is compiled.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lightsparse.patterns import BlockLayout, ElementMask
from lightsparse.patterns.grid import compact
from lightsparse.patterns.layout import no_dense_rows
from lightsparse.patterns.mask import ALWAYS, NEVER

_CHUNK = 1 << 20  # elements of an attn_mask compared at once


@torch.compiler.disable
def masked(layout: BlockLayout, heads: int, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> BlockLayout:
    """The layout with the masks of one call.

    key_padding_mask  [B, Nkv], attn_mask [Nq, Nkv] or [B·H, Nq, Nkv]: bool (True hides) or float (added to the scores)
    """
    mask, dense = layout.mask, None
    if attn_mask is not None:
        dense = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
        dense = dense[None, None] if dense.dim() == 2 else dense.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        hidden = key_padding_mask
        if hidden.dtype != torch.bool:  # PyTorch's encoder layers turn bool masks into 0 and −inf
            hidden = key_padding_mask == float("-inf")
            if key_padding_mask.requires_grad or not bool((hidden | (key_padding_mask == 0)).all()):
                added = key_padding_mask[:, None, None].expand(-1, 1, layout.num_queries, -1)
                if dense is not None and dense.dtype == torch.bool:
                    dense = torch.zeros_like(dense, dtype=added.dtype).masked_fill(~dense, float("-inf"))
                dense = added if dense is None else dense + added
        opens = torch.where(hidden, ALWAYS, mask.visible_from)
        mask = replace(mask, visible_from=opens, visible_until=mask.visible_until.expand_as(opens))
    return replace(layout, mask=replace(mask, dense=dense))


@torch.compiler.disable
def appended(layout: BlockLayout, count: int) -> BlockLayout:
    """The layout with `count` more keys that every query reads; they begin at the next whole block."""
    mask, padding = layout.mask, -layout.num_keys % layout.kv_block
    opens = mask.visible_from.new_full((1, padding + count), NEVER)
    opens[:, :padding] = ALWAYS
    dense, added = mask.dense, (0, padding + count)
    wider = replace(
        mask,
        visible_from=torch.cat([mask.visible_from, opens.expand(len(mask.visible_from), -1)], 1),
        visible_until=F.pad(mask.visible_until, added, value=ALWAYS),
        dense=None if dense is None else F.pad(dense, added, value=1 if dense.dtype == torch.bool else 0),
        num_tokens=layout.num_keys,
    )
    in_table = torch.ones(layout.num_q_blocks, 1, dtype=torch.bool, device=mask.device)
    in_table[layout.dense_rows.long()] = False
    blocks = torch.arange(layout.num_kv_blocks, -(-wider.num_keys // layout.kv_block), device=mask.device)
    table = layout.kv_indices
    table = torch.cat([table, blocks.to(torch.int32).expand(*table.shape[:3], -1)], -1)
    return replace(layout, kv_indices=compact(table, (table >= 0) & in_table), mask=wider)


@torch.compiler.disable
def is_causal_mask(attn_mask: Tensor) -> bool:
    """Whether the mask hides exactly the keys after the query. Stops at the first row that differs."""
    if attn_mask.dim() != 2 or attn_mask.requires_grad:
        return False
    key = torch.arange(attn_mask.shape[1], device=attn_mask.device)
    at_once = max(_CHUNK // len(key), 1)
    for start in range(0, len(attn_mask), at_once):
        rows = attn_mask[start : start + at_once]
        future = key > torch.arange(start, start + len(rows), device=key.device)[:, None]
        causal = future if rows.dtype == torch.bool else torch.where(future, float("-inf"), 0.0)
        if not bool((rows == causal).all()):
            return False
    return True


@lru_cache(maxsize=32)
def every_key(nq: int, nkv: int, block: int, device: torch.device) -> BlockLayout:
    """Attention between two sequences: every query block reads every key block."""
    with torch.inference_mode(False):  # a layout first built while evaluating serves training too
        every = torch.arange(-(-nkv // block), dtype=torch.int32, device=device)
        opens = torch.full((1, nkv), NEVER, dtype=torch.int32, device=device)
        position = torch.arange(nq, dtype=torch.int32, device=device)[None]
        mask = ElementMask(position, opens, torch.full_like(opens, ALWAYS), causal=False)
        table = every.expand(1, 1, -(-nq // block), -1).contiguous()
        return BlockLayout(table, block, block, mask, no_dense_rows(device))


@lru_cache(maxsize=32)
def of_the_past(layout: BlockLayout) -> BlockLayout:
    """A bidirectional layout without the keys after the query, and without blocks that hold nothing else."""
    with torch.inference_mode(False):
        table, mask = layout.kv_indices, layout.mask
        row = torch.arange(layout.num_q_blocks, device=table.device)[:, None]
        begun = table * layout.kv_block < (row + 1) * layout.q_block
        position = torch.arange(layout.num_keys, dtype=torch.int32, device=table.device)[None]
        past = replace(mask, visible_from=position, causal=True)
        return replace(layout, kv_indices=compact(table, (table >= 0) & begun), mask=past)
