"""The `sdpa` backend: a layout that is dense goes to PyTorch's own fused attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.mask import ALWAYS


def is_dense(layout: BlockLayout) -> bool:
    """Whether the layout is plain causal or plain full attention over one document, with no key hidden.

    Causal with fewer queries than keys counts only for a single query (decoding), which reads all keys.
    """
    mask, nq, nkv = layout.mask, layout.num_queries, layout.num_keys
    if mask.dense is not None or mask.q_doc is not None or mask.kv_doc is not None:
        return False
    if mask.causal and nq not in (1, nkv):
        return False
    key = torch.arange(nkv, device=mask.device)
    if mask.causal:
        unhidden = (mask.visible_from == key) & (mask.visible_until == ALWAYS)
        aligned = mask.q_pos == torch.arange(nkv - nq, nkv, device=mask.device)
    else:
        unhidden = (mask.visible_from <= mask.q_pos.min()) & (mask.visible_until > mask.q_pos.max())
        aligned = torch.ones_like(mask.q_pos, dtype=torch.bool)
    return bool(unhidden.all()) and bool(aligned.all()) and layout.density() == 1.0


def attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """out [B, H, Nq, D]."""
    causal = layout.mask.causal and layout.num_queries > 1
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
