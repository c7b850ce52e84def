"""The `sdpa` backend: a layout that is dense goes to PyTorch's own fused attention.

State of the process: `_dense`, what was found of each layout, as long as it lives.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.mask import ALWAYS

_dense: WeakKeyDictionary[BlockLayout, bool] = WeakKeyDictionary()


@torch.compiler.disable  # a compiled model takes the answer, it does not trace the question
def is_dense(layout: BlockLayout) -> bool:
    """Whether the layout is plain causal or plain full attention over one document, with no key hidden.

    Causal with fewer queries than keys counts only for a single query (decoding), which reads all keys.
    Looked at once per layout: on CUDA every look waits for the device.
    """
    if layout not in _dense:
        _dense[layout] = _is_dense(layout)
    return _dense[layout]


def _is_dense(layout: BlockLayout) -> bool:
    mask, nq, nkv = layout.mask, layout.num_queries, layout.num_keys
    if mask.dense is not None or mask.q_doc is not None or mask.kv_doc is not None:
        return False
    if mask.causal and nq not in (1, nkv):
        return False
    if layout.kv_indices.shape[3] < layout.num_kv_blocks and not len(layout.dense_rows):
        return False  # the last row cannot list all blocks: known without a look at the device
    key = torch.arange(nkv, device=mask.device)
    if mask.causal:
        unhidden = (mask.visible_from == key) & (mask.visible_until == ALWAYS)
        aligned = mask.q_pos == torch.arange(nkv - nq, nkv, device=mask.device)
    else:
        unhidden = (mask.visible_from <= mask.q_pos.min()) & (mask.visible_until > mask.q_pos.max())
        aligned = torch.ones_like(mask.q_pos, dtype=torch.bool)
    return bool(unhidden.all()) and bool(aligned.all()) and _reads_all_blocks(layout)


def _reads_all_blocks(layout: BlockLayout) -> bool:
    """Whether every row lists every key block up to its last query's (causal) or every one.

    Row by row: equal areas would also count a block too few in one row and one too many in another.
    """
    table, nq, nkv = layout.kv_indices, layout.num_queries, layout.num_keys
    row = torch.arange(layout.num_q_blocks, device=table.device)
    last = torch.full_like(row, layout.num_kv_blocks - 1)
    if layout.mask.causal:
        last = (nkv - nq + (row + 1) * layout.q_block - 1).clamp(max=nkv - 1) // layout.kv_block
    listed = ((table >= 0) & (table <= last[:, None])).sum(-1)
    return bool(((listed == last + 1) | torch.isin(row, layout.dense_rows)).all())


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, bias: None, dropout: None
) -> Tensor:
    """out [B, H, Nq, D]."""
    causal = layout.mask.causal and layout.num_queries > 1
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
