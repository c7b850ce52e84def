"""NSA's gates: how much of each branch a token takes (Yuan et al. 2025, arXiv 2502.11089, eq. 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.context_parallel.shard import sum_over

BRANCHES = ("compressed", "selected", "window")


class Gates(nn.Module):
    """σ(W x + b) per branch and query head, not normalised over the branches; ½ at the start."""

    def __init__(self, shape: AttentionShape):
        super().__init__()
        rows = len(BRANCHES) * shape.heads
        self.weight = nn.Parameter(torch.randn(rows, shape.embed_dim) * 0.02)
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x_BNE: Tensor) -> tuple[Tensor, ...]:
        """Of each branch, in the order of BRANCHES: [B, H, N], at least fp32."""
        dtype = torch.promote_types(x_BNE.dtype, torch.float32)
        with torch.autocast(x_BNE.device.type, enabled=False):
            logits = F.linear(x_BNE.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return logits.sigmoid().unflatten(-1, (len(BRANCHES), -1)).permute(2, 0, 3, 1).unbind(0)


@torch.no_grad()
def mean_gates(gates: tuple[Tensor, ...], length: int, ctx: SequenceContext) -> dict[str, Tensor]:
    """Scalars for the log, over all `length` tokens of the sequence."""
    sums = torch.stack([gate.mean((0, 1)).sum() for gate in gates])
    if ctx.shard is not None:
        sums = sum_over(sums, ctx.shard)
    return {f"gate_{branch}": mean.float() for branch, mean in zip(BRANCHES, sums / length, strict=True)}
