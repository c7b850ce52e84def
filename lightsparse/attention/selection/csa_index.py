"""DeepSeek-V4's lightning indexer (eq. 13–17): that of indexer.py, its keys pooled as CSA's entries are.

V4's published code has no training of the indexer: it learns here as V3.2's does (indexer_loss.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightsparse.attention.core import SequenceContext
from lightsparse.attention.pooling.csa_compress import Compressor, compressed, entry_positions
from lightsparse.attention.selection.indexer import STD, Index, IndexQueries, as_read


class CompressedIndexer(IndexQueries):
    """x → index queries and weights of its tokens, and keys from a compressor of its own."""

    def __init__(self, embed_dim: int, heads: int, width: int, stride: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(embed_dim, heads * width, bias=False)
        self.weight = nn.Linear(embed_dim, heads, bias=False)
        for linear in (self.query, self.weight):
            nn.init.normal_(linear.weight, std=STD)
        self.compressor = Compressor(embed_dim, 1, width, stride, overlap=True)

    def forward(self, x: Tensor, ctx: SequenceContext, state: dict[str, Tensor]) -> Index:
        """x [B, R, E] at ctx.positions → Index with the keys of all entries of the sequence so far.

        state  as in `compressed`
        """
        with torch.autocast(x.device.type, enabled=False):
            x = as_read(x)
            keys = compressed(self.compressor, x, ctx, state, "index")
            if ctx.rotary is not None:
                keys = ctx.rotary(keys, entry_positions(keys.shape[2], self.compressor.stride, ctx, keys.device))
            return Index(*self.of_queries(x, ctx), keys[:, 0])
