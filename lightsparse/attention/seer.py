"""SeerAttention-R: a learned gate picks the key blocks of every token, distilled from dense attention's own map.

Gao et al. 2024 (SeerAttention, arXiv 2410.13276) and 2025 (SeerAttention-R, arXiv 2506.08889), whose gate has a query
per token: a query pooled over a block, as in the first, would let its first token's choice see later ones.
The gate is block_gate.py, the loss block_kl.py. The loss trains the gate alone, and nothing else trains the gate: what
it reads of the model, q, k and the target, is detached, and a choice has no gradient.
The paper's recipe freezes a trained model and distils its gates under dense attention:
init_from=… trainer.selector_only_steps=-1 attention.dense_steps=<all steps but the last>. A checkpoint is evaluated in
the stage of its last step, here with the gates at work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.attention.pooling.block_means import block_documents, gather_block_means
from lightsparse.attention.selection.block_gate import BlockGate, block_positions, pooled_keys, unrotated
from lightsparse.attention.selection.block_kl import block_kl
from lightsparse.attention.selection.token_blocks import Scored, TokenBlocksAttention, TokenBlocksConfig
from lightsparse.attention.selection.top_blocks import Documents, Rule
from lightsparse.attention.sharded_call import sequence_length
from lightsparse.context_parallel.shard import sum_over
from lightsparse.patterns.mask import document_starts


@dataclass(frozen=True)
class SeerConfig(TokenBlocksConfig):
    block: int = 64  # tokens per key block
    top_k: int = 12  # blocks that a query reads at most, its own included
    threshold: float = 0.0  # share of the gate from which a block is read; 0 = always top_k
    first_block: bool = False  # always read the first block of the document, too; it counts in top_k
    gate_dim: int = 64  # width of the gate's product

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"attention.threshold is {self.threshold}; a share of the gate must lie in [0, 1)")
        if self.gate_dim < 2 or self.gate_dim % 2:
            raise ValueError(
                f"attention.gate_dim is {self.gate_dim}; the gate rotates pairs, so it must be even and at least 2"
            )
        if self.first_block and self.top_k < 2:
            raise ValueError(
                f"attention.first_block is true and attention.top_k {self.top_k}; the own block and the first one are "
                "two: raise top_k, or set first_block=false"
            )

    def small(self) -> Self:
        return replace(self, block=16, top_k=3, gate_dim=8)

    def full(self) -> Self:
        return replace(self, top_k=1 << 24, threshold=0.0)


class SeerAttention(TokenBlocksAttention):
    """The gate's softmax over the blocks before the own one, per key/value head; what is read: TokenBlocksAttention.

    In training the mean KL of the target against the gate is the auxiliary loss, over all tokens that have at least two
    blocks to choose from. It takes dense attention's scores, whatever is read, and where ranks share a sequence all of
    its keys; in evaluation neither is computed, and ranks exchange pooled keys alone.

    Stats: density; kept_mass; in training selection_kl in nats and uniform_kl, that of a gate that knows nothing.
    """

    Config = SeerConfig
    gated: SeerConfig
    logged = ("kept_mass", "selection_kl", "uniform_kl")

    def __init__(self, config: SeerConfig, shape: AttentionShape):
        super().__init__(config, shape)
        self.gated = config  # `config` under its own type
        self.gate = BlockGate(shape, config.gate_dim)

    def rule(self) -> Rule:
        return Rule(self.gated.threshold, self.gated.first_block)

    @torch.compiler.disable
    @torch.no_grad()
    def scored(self, q: Tensor, k: Tensor, ctx: SequenceContext) -> Scored:
        return self._features(q, k, ctx)

    def keep(self, scored: Scored, length: int, state: dict[str, Tensor]) -> None:
        state["gate_keys"] = scored.blocks[:, :, : length // self.options.block]  # of complete blocks: they are final

    @torch.compiler.disable
    def learned(self, q: Tensor, k: Tensor, ctx: SequenceContext) -> tuple[Tensor | None, dict[str, Tensor]]:
        # Every parameter is in the loss at every step, or DDP would wait for its gradient.
        nothing = 0.0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
        if not self.training:
            return nothing, {}
        block, n = self.options.block, sequence_length(k, ctx)
        features = self._features(q, k, ctx)
        tokens, documents = torch.arange(n, device=q.device), None
        if ctx.shard is not None:
            tokens = ctx.shard.tokens.to(q.device)
            with torch.no_grad():
                k = gather_block_means(k.detach(), ctx.shard, 1)
        if ctx.documents is not None:
            documents = Documents(ctx.documents[:, tokens], block_documents(ctx.documents, block, "last"))
        sums = block_kl(features.queries, features.blocks, q, k, tokens, block, ctx.documents, documents)
        if ctx.shard is not None:
            sums = type(sums)(*(sum_over(each, ctx.shard) for each in sums))
        rows = sums.rows.clamp(min=1)
        kl = sums.kl / rows
        return kl + nothing, {"selection_kl": kl.detach(), "uniform_kl": sums.uniform / rows}

    def _features(self, q: Tensor, k: Tensor, ctx: SequenceContext) -> Scored:
        """The gate's features, differentiable by its parameters alone."""
        with torch.autocast(q.device.type, enabled=False):
            return Scored(self.gate.of_queries(q.detach(), ctx.positions, ctx.rotary), self._blocks(k.detach(), ctx))

    def _blocks(self, k: Tensor, ctx: SequenceContext) -> Tensor:
        """Features of all blocks of the sequence, [B, Hkv, C, F]; the last, where it is not whole, is never chosen."""
        block, n, documents = self.options.block, sequence_length(k, ctx), ctx.documents
        starts = None if documents is None else document_starts(documents)[:, :n]
        position = torch.arange(n, device=k.device)[None] - (0 if starts is None else starts)
        of_blocks = block_positions(n, block, starts, k.device)
        if ctx.shard is not None:
            own = None if documents is None else ctx.shard.take(documents)
            pooled = pooled_keys(unrotated(k, ctx.shard.take(position), ctx.rotary), block, own)
            return self.gate.of_blocks(gather_block_means(pooled, ctx.shard, block), of_blocks, ctx.rotary)
        earlier = None
        if ctx.q_start and ctx.states is not None:
            earlier = ctx.states[self.shape.layer].get("gate_keys")
        done = 0 if earlier is None else earlier.shape[2]
        rest = slice(done * block, n)
        plain = unrotated(k[:, :, rest], position[:, rest], ctx.rotary)
        pooled = pooled_keys(plain, block, None if documents is None else documents[:, rest])
        new = self.gate.of_blocks(pooled, of_blocks[:, done:], ctx.rotary)
        return new if earlier is None else torch.cat([earlier, new], 2)
