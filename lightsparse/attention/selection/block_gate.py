"""SeerAttention-R's gate (arXiv 2506.08889, section 3.1): learned features of queries and of pooled key blocks.

Per key/value head, with q and k as they are before the model rotates them, and RoPE inside the gate:
    Q = RoPE(W_q · [q of the heads of the group, side by side])          at the token's position
    K = RoPE(W_k · [max, min, mean of the block's keys, side by side])   at the position of the block's first token
The score of a token for a block is Q · K / √F.

Shapes: B batch, H query heads, Hkv key/value heads, G = H / Hkv, n tokens, C blocks, D head dim, F gate width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightsparse.attention.core import AttentionShape, Rotary
from lightsparse.attention.pooling.block_means import block_documents, block_means


class BlockGate(nn.Module):
    """The two linear maps of every key/value head.

    They start so that the score is a random projection of Σ q · mean(k) over the group, the affinity of MoBA (Lu et al.
    2025, arXiv 2502.13189): better than chance before the first step. The paper's start at random.
    """

    def __init__(self, shape: AttentionShape, width: int):
        super().__init__()
        group, dim = shape.heads // shape.kv_heads, shape.head_dim
        same = torch.randn(shape.kv_heads, dim, width) / math.sqrt(dim)
        self.query = nn.Parameter(same.repeat(1, group, 1) / math.sqrt(group))
        self.key = nn.Parameter(torch.cat([torch.zeros_like(same), torch.zeros_like(same), same], 1))

    def of_queries(self, q: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
        """q [B, H, n, D], rotated by the model, at positions int64 [B|1, n] → [B, Hkv, n, F], over √F."""
        plain = unrotated(q, positions, rotary).unflatten(1, (len(self.query), -1)).transpose(2, 3).flatten(3)
        features = plain @ self.query.to(plain.dtype) * self.query.shape[-1] ** -0.5
        return features if rotary is None else rotary(features, positions)

    def of_blocks(self, pooled: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
        """pooled [B, Hkv, C, 3D] of blocks that begin at positions int64 [B|1, C] → [B, Hkv, C, F]."""
        features = pooled @ self.key.to(pooled.dtype)
        return features if rotary is None else rotary(features, positions)


def unrotated(x: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
    """Heads [B, H, n, D] as they were before the model rotated them, at least fp32.

    A rotation by the negative angle. Where the model scales what it rotates (yarn), the square of that is left on it.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if rotary is None else rotary(x, -positions)


def pooled_keys(k: Tensor, block: int, documents: Tensor | None) -> Tensor:
    """Max, min and mean over the tokens of each block's last token's document: [B, Hkv, n, D] → [B, Hkv, C, 3D].

    documents  int [B, n] or None
    """
    missing = -k.shape[2] % block
    inside = F.pad(torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device), (0, missing)).unflatten(1, (-1, block))
    if documents is not None:
        ids = F.pad(documents, (0, missing)).unflatten(1, (-1, block))
        inside = inside & (ids == block_documents(documents, block, "last")[..., None])
    outside, blocks = ~inside[:, None, :, :, None], F.pad(k, (0, 0, 0, missing)).unflatten(2, (-1, block))
    most, least = (blocks.masked_fill(outside, -math.inf).amax(3), blocks.masked_fill(outside, math.inf).amin(3))
    return torch.cat([most, least, block_means(k, block, documents, "last").to(k.dtype)], -1)


def block_positions(length: int, block: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """Position of the first pooled token of each block, counted from its document's start: int64 [B|1, C].

    starts  int [B, length]: where each token's document starts; None = one document
    """
    first = torch.arange(0, length, block, device=device)[None]
    if starts is None:
        return first
    return (first - block_documents(starts, block, "last")).clamp(min=0)
