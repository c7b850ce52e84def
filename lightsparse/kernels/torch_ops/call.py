"""One call of a plain PyTorch backend: its inputs by list of key blocks and by key block, sums of its gradients.

A list is a row of the layout's table, for one of the heads that read it. Names of dimensions, here and in lists.py:
U = heads with lists of their own (H where the table has one per query head, else Hkv), G = H / U query heads that share
a list, L = B · U · NQ lists, Q = q_block, M = Q · G queries of a list, K = entries of a list, S = keys of a block,
C = K · S, J = key blocks of a head, Y = B · Hkv · J, D = head dim. List (b · U + u) · NQ + I is row I of head u; its
query i · G + g is query i of the block, of head u · G + g.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.kernels import chunk_sizes
from lightsparse.kernels.compute_dtype import sum_dtype
from lightsparse.kernels.dropout import Dropout, key_hashes
from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.mask import ALWAYS


class Call:
    """What forward and backward share.

    dtype        of what the matrix products multiply; sums over many of them are kept in sum_dtype
    score_dtype  of what the products give: dtype on a CPU; where chunks are wide sum_dtype, so that half precision is
                 multiplied and nothing else
    late_scale   of the scores: 1 where q can take the scale without rounding anew
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        bias: Tensor | None,
        dropout: Dropout | None,
        dtype: torch.dtype,
    ):
        self.layout, self.scale, self.dropout = layout, scale, dropout
        self.dtype, self.sum_dtype, self.device = dtype, sum_dtype(q), q.device
        self.B, self.H, self.N, self.D = q.shape
        self.Hkv, self.Q, self.S, self.NQ = k.shape[1], layout.q_block, layout.kv_block, layout.num_q_blocks
        self.U = self.H if layout.kv_indices.shape[1] == self.H else self.Hkv
        self.G, self.J = self.H // self.U, max(layout.num_kv_blocks, 1)
        self.L, self.M = self.B * self.U * self.NQ, self.Q * self.G
        self.wide = chunk_sizes.is_wide(q.device)
        self.score_dtype = self.sum_dtype if self.wide else dtype
        self.late_scale = 1.0 if self.score_dtype == dtype else scale
        self.q_LMD = self.by_list(q.to(dtype) * scale if self.late_scale == 1.0 else q)
        self.k_YSD, self.v_YSD = (self._by_block(x).flatten(0, 2) for x in (k, v))
        self.bias_LGK = None
        if bias is not None:
            bias = bias.repeat_interleave(self.H // bias.shape[1], 1).expand(self.B, -1, -1, -1)
            bias_BUNGK = bias.unflatten(1, (self.U, self.G)).transpose(2, 3)
            self.bias_LGK = bias_BUNGK.flatten(0, 2).to(self.sum_dtype)

        # The mask and dropout's hashes by key block, [B|1, J, S]; keys that fill up the last block never open.
        mask, number = layout.mask, torch.arange(self.J * self.S, device=q.device)
        self.opens, self.closes = (self._by_block(x, ALWAYS) for x in (mask.visible_from, mask.visible_until))
        self.last_opens, self.first_closes = self.opens.amax(-1), self.closes.amin(-1)
        self.documents = None
        if mask.q_doc is not None and mask.kv_doc is not None:
            self.documents = self._by_block(mask.kv_doc, -1)
            self.first_document, self.last_document = self.documents.amin(-1), self.documents.amax(-1)
        self.key_hashes = None if dropout is None else key_hashes(dropout, number).view(1, self.J, self.S)

    def by_list(self, x: Tensor) -> Tensor:
        """[B, H, N, …] → [L, M, …], the last list of each head filled up with zeros."""
        missing = self.NQ * self.Q - self.N
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing)) if missing else x
        x = x.unflatten(1, (self.U, self.G)).unflatten(3, (self.NQ, self.Q)).movedim(2, 4)
        return x.reshape(self.L, self.M, *x.shape[5:])

    def by_head(self, x: Tensor) -> Tensor:
        """[L, M, …] → [B, H, N, …]"""
        x = x.view(self.B, self.U, self.NQ, self.Q, self.G, *x.shape[2:]).movedim(4, 2)
        return x.flatten(3, 4).flatten(1, 2)[:, :, : self.N].contiguous()

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """Batched matrix product of two tensors of `dtype`, in score_dtype."""
        if self.score_dtype == self.dtype:
            return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
        if a.device.type != "cpu":
            result = torch.bmm(a, b, out_dtype=self.score_dtype)
        else:  # there is no such product; products of two half-precision numbers are exact in fp32
            result = torch.bmm(a.to(self.score_dtype), b.to(self.score_dtype))
        return result if out is None else out.copy_(result)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled products of rows of q_LMD [.., M, D] and keys [.., C, D]: [.., M, C]."""
        scores = self.product(q, k.mT)
        return scores if self.late_scale == 1.0 else scores.mul_(self.late_scale)

    def nothing_read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The output [L, M, D] and log-sum-exp [L, M] of queries that read nothing, to be filled."""
        out_LMD = torch.zeros(self.q_LMD.shape, dtype=dtype, device=self.device)
        return out_LMD, out_LMD.new_full(out_LMD.shape[:2], float("-inf"), dtype=torch.float64)

    def _by_block(self, x: Tensor, filled: int = 0) -> Tensor:
        """Numbers [B|1, Nkv] or vectors [B, Hkv, Nkv, D] of keys, their dimension cut into [J, S]."""
        missing, dim = self.J * self.S - self.layout.num_keys, x.dim() // 2
        x = F.pad(x, (0, 0) * (dim - 1) + (0, missing), value=filled) if missing else x
        return x.unflatten(dim, (self.J, self.S))

    def at(self, values: Tensor, block: Tensor) -> Tensor:
        """The values [B|1, J, …] of some key blocks, which are numbered over all heads."""
        if len(values) == 1:
            return values[0, block % self.J]
        return values[block // (self.J * self.Hkv) % len(values), block % self.J]

    def may_read(self, block: Tensor, position: Tensor, document: Tensor | None) -> Tensor:
        """Whether queries […, M] may read the keys of a block […]: bool […, M, S]."""
        opens, closes = (self.at(x, block)[..., None, :] for x in (self.opens, self.closes))
        allowed = (opens <= position[..., None]) & (position[..., None] < closes)
        if document is not None and self.documents is not None:
            allowed &= document[..., None] == self.at(self.documents, block)[..., None, :]
        return allowed

    def is_partial(self, block: Tensor, position: Tensor, document: Tensor | None) -> Tensor:
        """Whether some of those pairs may not be read, so that they need a mask: bool […]."""
        full = self.at(self.last_opens, block) <= position.amin(-1)
        full &= self.at(self.first_closes, block) > position.amax(-1)
        if document is not None and self.documents is not None:
            first, last = document.amin(-1), document.amax(-1)
            full &= (first == last) & (self.at(self.first_document, block) == first)
            full &= self.at(self.last_document, block) == first
        return ~full


class Gradients:
    """What a backward pass reads by list, and what it adds up."""

    def __init__(self, call: Call, grad_out: Tensor, grad_lse: Tensor | None):
        self.call = call
        self.dout_LMD = call.by_list(grad_out)
        self.dlse_LM = None if grad_lse is None else call.by_list(grad_lse).to(call.sum_dtype)
        self.dq_LMD = torch.zeros_like(call.q_LMD, dtype=call.score_dtype)
        self.dk_YSD, self.dv_YSD = (torch.zeros_like(call.k_YSD, dtype=call.sum_dtype) for _ in "kv")
        self.dbias_LGK = None if call.bias_LGK is None else torch.zeros_like(call.bias_LGK)

    def add_keys(self, block: Tensor, dk: Tensor, dv: Tensor) -> None:
        """dk, dv: the parts of some key blocks, one behind the other; dk lacks the late scale."""
        for total, part in ((self.dk_YSD, dk), (self.dv_YSD, dv)):
            total.flatten(1).index_add_(0, block, part.view(len(block), -1).to(total.dtype))

    def of_inputs(self, k: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and, if given, the bias."""
        call = self.call
        dq = call.by_head(self.dq_LMD * call.scale).to(k.dtype)
        by_head = (call.B, call.Hkv, call.J * call.S, call.D)
        dk_YSD = self.dk_YSD if call.late_scale == 1.0 else self.dk_YSD * call.late_scale
        dk, dv = (x.view(by_head)[:, :, : k.shape[2]].to(k.dtype) for x in (dk_YSD, self.dv_YSD))
        if bias is None or self.dbias_LGK is None:
            return dq, dk, dv, None
        dbias_BUGNK = self.dbias_LGK.view(call.B, call.U, call.NQ, call.G, -1).transpose(2, 3)
        dbias = dbias_BUGNK.flatten(1, 2).unflatten(1, (bias.shape[1], -1)).sum(2).sum_to_size(bias.shape)
        return dq, dk, dv, dbias.to(bias.dtype)
