"""MoBA, mixture of block attention (Lu et al. 2025, arXiv 2502.13189, section 2.2): every token picks its key blocks.

The score of query t for block J is s = ⟨q_t, mean(K_J)⟩ (eq. 6), per query head. Read are the top_k blocks by score
under one softmax (eq. 2–5), the own block always among them and causal inside, later ones never. Nothing is learned
beside q and k: the choice has no gradient and no loss of its own, so q and k learn through what is read.
The paper keeps full attention in some layers, and in all of them at the end of the training (section 3.2):
model.layer_pattern=SSSD, attention.dense_from (experiment=moba_hybrid).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightsparse.attention.core import SequenceContext
from lightsparse.attention.pooling.block_means import block_means, gather_block_means
from lightsparse.attention.selection.token_blocks import Scored, TokenBlocksAttention, TokenBlocksConfig


@dataclass(frozen=True)
class MobaConfig(TokenBlocksConfig):
    block: int = 128  # tokens per key block; the paper: 512 for a context of 8k, 4096 for one of 1M
    top_k: int = 6  # blocks that a query reads, its own included; the paper: 3 of 16 blocks, 12 of 256

    def small(self) -> Self:
        return replace(self, block=16, top_k=3)

    def full(self) -> Self:
        return replace(self, top_k=1 << 24)


class MobaAttention(TokenBlocksAttention):
    """A block's score is the product of the query with its mean key; what is read: TokenBlocksAttention.

    With documents a block's mean is over the tokens of its last token's document.
    """

    Config = MobaConfig

    def scored(self, q: Tensor, k: Tensor, ctx: SequenceContext) -> Scored:
        return Scored(q.detach(), self._block_means(k, ctx))

    def keep(self, scored: Scored, length: int, state: dict[str, Tensor]) -> None:
        state["block_means"] = scored.blocks[:, :, : length // self.options.block]  # of complete blocks: they are final

    @torch.compiler.disable
    @torch.no_grad()
    def _block_means(self, k: Tensor, ctx: SequenceContext) -> Tensor:
        """Mean key of each block of the sequence, at least fp32: [B, Hkv, blocks, D]."""
        block, documents = self.options.block, ctx.documents
        with torch.autocast(k.device.type, enabled=False):
            if ctx.shard is not None:
                documents = None if documents is None else ctx.shard.take(documents)
                return gather_block_means(block_means(k, block, documents, "last"), ctx.shard, block)
            earlier = None
            if ctx.q_start and ctx.states is not None:
                earlier = ctx.states[self.shape.layer].get("block_means")
            done = 0 if earlier is None else earlier.shape[2] * block
            new = block_means(
                k[:, :, done:], block, None if documents is None else documents[:, done : k.shape[2]], "last"
            )
            return new if earlier is None else torch.cat([earlier, new], 2)
