"""Block-sparse dilated attention over ranks, by itself: for models outside this framework's trainer.

Inside it, strategy=context gives every variant the same through SequenceContext.shard.
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionResult, AttentionShape, Rotary, SequenceContext
from lightsparse.context_parallel.shard import ContextShard, Exchange
from lightsparse.context_parallel.split import SplitKind, imbalance, split


class BlockSparseRingDistributedDilatedAttention(BlockSparseRingDilatedAttention):
    """One sequence of `length` tokens over the ranks of `group`; out and gradients are those of one rank.

    length    tokens of the whole sequence; a call takes and returns those of `shard.tokens` (shard.take cuts them out)
    group     None: all ranks of the job
    kind      of the split: contiguous, head_tail, or balanced (the ranks compute about equally many tiles)
    exchange  sparse, ring, gather, or auto (see ContextShard)
    timeout   seconds of the group's timeout, for its error messages

    All ranks call it together, forward and backward. A rank that has ended or does not call raises LostRankError or
    RankTimeoutError on the others, after the group's timeout at the latest.
    Raises ValueError without a process group, and where the sequence has fewer blocks than ranks.
    """

    needs_hidden_states = False

    def __init__(
        self,
        config: BlockSparseConfig,
        shape: AttentionShape,
        *,
        length: int,
        group: dist.ProcessGroup | None = None,
        kind: SplitKind = "balanced",
        exchange: Exchange = "auto",
        timeout: float | None = None,
    ):
        super().__init__(config, shape)
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"{type(self).__name__} needs a process group; start the ranks with torchrun and call "
                "torch.distributed.init_process_group, or use BlockSparseRingDilatedAttention on one rank"
            )
        group = dist.group.WORLD if group is None else group
        assert group is not None
        unit = self.split_granularity()
        self.costs = self.row_costs(length, unit)
        self.shard = ContextShard(
            split(kind, length, unit, dist.get_world_size(group), self.costs), group, exchange, timeout
        )

    @property
    def imbalance(self) -> float:
        """Computed tiles of the busiest rank ÷ those of the mean rank; 1 is even."""
        return imbalance(self.shard.split.owners, self.costs, self.shard.world)

    def context(
        self,
        q: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> SequenceContext:
        """For q [B, H, n, D] of this rank's tokens; documents int [B, length] of the whole sequence."""
        ctx = SequenceContext.plain(self.shard.length, documents, rotary=rotary, device=q.device)
        return replace(ctx, positions=self.shard.take(ctx.positions) if positions is None else positions)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, x: Tensor, ctx: SequenceContext) -> AttentionResult:
        return super().attend(q, k, v, x=x, ctx=replace(ctx, shard=self.shard))
