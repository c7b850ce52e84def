"""One call of the `routed` backend: its inputs as rows and key blocks, and the sums of its gradients.

Names: those of routes.py, and Z = B · Hkv, G = query heads of a key/value head, N = queries of a head, J = key blocks
of a head (Y = Z · J), S = keys of a block, D = head dim. Row (z · N + n) · G + g is query n of head g of the group z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.kernels import blocked
from lightsparse.kernels.blocked import sum_dtype
from lightsparse.kernels.dropout import Dropout, key_hashes
from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.mask import ALWAYS


class Call:
    """What forward and backward share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        bias: Tensor | None,
        dropout: Dropout | None,
    ):
        self.B, self.H, self.N, self.D = q.shape
        self.Hkv, self.G = k.shape[1], q.shape[1] // k.shape[1]
        self.layout, self.scale, self.dropout = layout, scale, dropout
        self.dtype, self.device = sum_dtype(q), q.device
        self.S, self.J = layout.kv_block, layout.num_kv_blocks
        self.Y = self.B * self.Hkv * self.J
        self.q_RD = self.rows_of(q)
        self.k_YSD, self.v_YSD = (self._key_blocks(x) for x in (k, v))
        self.table = layout.kv_indices
        self.lists = self.G if self.table.shape[1] == self.H and self.G > 1 else 1  # of a query, in a group
        self.K = self.table.shape[3]
        self.bias_RK = None if bias is None else self.rows_of(_expanded(bias, self.B, self.H).to(self.dtype))
        self.keys = Keys(layout, dropout)

    def rows_of(self, x: Tensor) -> Tensor:
        """[B, H, N, …] → [R, …]"""
        x = x.unflatten(1, (self.Hkv, self.G)).transpose(2, 3)
        return x.reshape(-1, *x.shape[4:])

    def by_head(self, x: Tensor) -> Tensor:
        """[R, …] → [B, H, N, …]"""
        x = x.view(self.B, self.Hkv, self.N, self.G, *x.shape[1:])
        return x.transpose(2, 3).flatten(1, 2)

    def _key_blocks(self, x: Tensor) -> Tensor:
        """[B, Hkv, Nkv, D] → [Y, S, D], the last block of each head padded with zeros."""
        missing = self.J * self.S - x.shape[2]
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return x.reshape(self.Y, self.S, self.D)


class Keys:
    """The mask's and dropout's numbers of keys, by block: [B|1, J, S]; keys that fill up a short block never open."""

    def __init__(self, layout: BlockLayout, dropout: Dropout | None):
        mask, total = layout.mask, layout.num_kv_blocks * layout.kv_block

        def by_block(values: Tensor, filled: int) -> Tensor:
            return F.pad(values, (0, total - values.shape[1]), value=filled).unflatten(1, (-1, layout.kv_block))

        self.opens, self.closes = by_block(mask.visible_from, ALWAYS), by_block(mask.visible_until, ALWAYS)
        self.documents = None
        if mask.q_doc is not None and mask.kv_doc is not None:
            self.documents = by_block(mask.kv_doc, -1)
        self.hashes = None
        if dropout is not None:
            self.hashes = key_hashes(dropout, torch.arange(total, device=mask.device)).view(1, -1, layout.kv_block)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows that follow one another, and of each: position, document (or None), dropout's hash (or None)."""

    rows: slice
    position: Tensor
    document: Tensor | None
    hashes: Tensor | None


class Gradients:
    """What the backward reads by row, and what it adds up."""

    def __init__(self, call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor):
        self.call = call
        self.dout_RD, self.lse_R = call.rows_of(grad_out), call.rows_of(lse)
        self.delta_R = call.rows_of((grad_out.to(call.dtype) * out.to(call.dtype)).sum(-1))
        if grad_lse is not None:  # d lse / d s = p
            self.delta_R = self.delta_R - call.rows_of(grad_lse.to(call.dtype))
        self.dq_RD = torch.zeros_like(call.q_RD)
        self.dk_YSD, self.dv_YSD = (torch.zeros_like(call.k_YSD, dtype=call.dtype) for _ in "kv")
        self.bias_RK = None if call.bias_RK is None else torch.zeros_like(call.bias_RK)

    def add_keys(self, block: Tensor, grad_TSD: Tensor) -> None:
        self.dk_YSD.flatten(1).index_add_(0, block, grad_TSD.flatten(1))

    def add_values(self, block: Tensor, grad_TSD: Tensor) -> None:
        self.dv_YSD.flatten(1).index_add_(0, block, grad_TSD.flatten(1))

    def of_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        call = self.call

        def by_token(x_YSD: Tensor) -> Tensor:
            x = x_YSD.view(call.B, call.Hkv, -1, call.D)[:, :, : call.layout.num_keys]
            return x.to(call.k_YSD.dtype)

        return call.by_head(self.dq_RD).contiguous(), by_token(self.dk_YSD), by_token(self.dv_YSD)

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or self.bias_RK is None:
            return None
        return blocked.summed_to(self.call.by_head(self.bias_RK), bias.shape).to(bias.dtype)


def _expanded(bias: Tensor, batch: int, heads: int) -> Tensor:
    """[B|1, H|Hkv|1, NQ, K] → [B, H, NQ, K]"""
    return bias.repeat_interleave(heads // bias.shape[1], 1).expand(batch, -1, -1, -1)
