"""How far a gate over key blocks is from attention's own map: the loss that SeerAttention distils it by.

Target of token t (arXiv 2410.13276, section 3.3; per token as in 2506.08889, section 3.2): the softmax weights of dense
attention, of each block the largest over its keys and over the query heads of the group, renormalised over blocks.
Here over the blocks that can be chosen, those before the own one, which is read anyway and whose pooled key would hold
later tokens. Everything is in logarithms until then, so that a row whose own block has nearly all weight still teaches.

Rows are worked on a few at a time. The loss is a sum, so its gradient by the scores, softmax − target, is at hand where
the target is: both are taken in the same pass, and what is kept for the backward is as large as the gate's features.

Shapes: B batch, H query heads, Hkv key/value heads, R queries, N keys, C blocks, D head dim, F gate width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightsparse.attention.selection.row_parts import slices
from lightsparse.attention.selection.top_blocks import Documents
from lightsparse.kernels import chunk_sizes

_WEIGHTS, _WIDE_WEIGHTS = 1 << 20, 1 << 26  # of query–key pairs in memory at once; the second where chunks are wide


class BlockKL(NamedTuple):
    """Sums over rows (queries of every sample and key/value head) that have at least two blocks to choose from."""

    kl: Tensor  # of target against gate, nats; differentiable by the gate's features
    uniform: Tensor  # of target against a gate that knows nothing
    rows: Tensor  # how many they are


class _Keys(NamedTuple):
    """What attention is computed from, without gradient."""

    q: Tensor  # [B, H, R, D]
    k: Tensor  # [B, Hkv, N, D], filled up to whole blocks
    ids: Tensor | None  # document of every key, [B, N]; None = one
    tokens: Tensor  # int64 [R]: places of the queries, ascending
    block: int
    documents: Documents | None  # of queries and blocks


@torch.compiler.disable
def block_kl(
    gate_q: Tensor,
    gate_k: Tensor,
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    block: int,
    ids: Tensor | None = None,
    documents: Documents | None = None,
) -> BlockKL:
    """gate_q [B, Hkv, R, F] and gate_k [B, Hkv, C, F], whose product is the gate's score; q [B, H, R, D] at `tokens`,
    k [B, Hkv, N, D] of the whole sequence, ids [B, N] their documents."""
    missing = -k.shape[2] % block
    k = F.pad(k.detach().to(gate_k.dtype), (0, 0, 0, missing))
    ids = ids if ids is None or not missing else F.pad(ids, (0, missing), value=-1)
    keys = _Keys(q.detach(), k, ids, tokens, block, documents)
    with torch.autocast(q.device.type, enabled=False):
        return BlockKL(*_BlockKL.apply(gate_q, gate_k, keys))


class _BlockKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_q: Tensor, gate_k: Tensor, keys: _Keys) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, rows, _ = keys.q.shape
        sums = gate_q.new_zeros(3)
        grad_q, grad_k = torch.zeros_like(gate_q), torch.zeros_like(gate_k)
        weights = chunk_sizes.at_once(gate_q.device, _WEIGHTS, _WIDE_WEIGHTS)
        at_once = max(weights // max(batch * heads * keys.k.shape[2], 1), 1)
        for part in slices(rows, at_once):
            columns = gate_k.shape[2]
            if not chunk_sizes.is_wide(gate_q.device):
                columns = int(keys.tokens[part.stop - 1]) // keys.block  # blocks before the last row's own one
            if columns == 0:
                continue
            log_target, candidates = _log_target(keys, part, columns)
            scores = gate_q[:, :, part] @ gate_k[:, :, :columns].mT
            log_gate = scores.masked_fill(~candidates, torch.finfo(scores.dtype).min).log_softmax(-1)
            count = candidates.sum(-1)
            counted = (count > 1)[..., None] & candidates
            target = log_target.exp() * counted
            entropy = (target * log_target.masked_fill(~counted, 0.0)).sum()
            sums[0] += entropy - (target * log_gate.masked_fill(~counted, 0.0)).sum()
            sums[1] += entropy + (target.sum(-1) * count.clamp(min=1).to(target.dtype).log()).sum()
            sums[2] += (count > 1).expand(target.shape[:3]).sum()
            by_score = log_gate.exp() * counted - target
            grad_q[:, :, part] = by_score @ gate_k[:, :, :columns]
            grad_k[:, :, :columns] += by_score.mT @ gate_q[:, :, part]
        ctx.save_for_backward(grad_q, grad_k)
        kl, uniform, number = sums.unbind()
        ctx.mark_non_differentiable(uniform, number)
        return kl, uniform, number

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor):
        grad_q, grad_k = ctx.saved_tensors
        return grad * grad_q, grad * grad_k, None


def _log_target(keys: _Keys, part: slice, columns: int) -> tuple[Tensor, Tensor]:
    """Logarithm of the target [B, Hkv, R, C] of some rows, and which blocks each can choose, bool [B|1, 1, R, C].

    The entries of blocks that cannot be chosen are meaningless.
    """
    tokens, block = keys.tokens[part], keys.block
    reach = k_end = keys.k.shape[2]
    if not chunk_sizes.is_wide(keys.k.device):
        reach = min((int(tokens[-1]) // block + 1) * block, k_end)
    k = keys.k[:, :, :reach]
    q = keys.q[:, :, part].to(k.dtype).unflatten(1, (k.shape[1], -1)) * k.shape[-1] ** -0.5
    at = torch.arange(reach, device=k.device)
    visible = (at <= tokens[:, None])[None, None, None]
    before = (torch.arange(columns, device=k.device) < (tokens // block)[:, None])[None, None]
    if keys.ids is not None and keys.documents is not None:
        of_queries = keys.documents.of_queries[:, part]
        visible = visible & (keys.ids[:, None, :reach] == of_queries[..., None])[:, None, None]
        before = before & (keys.documents.of_blocks[:, None, :columns] == of_queries[..., None])[:, None]
    scores = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4]).masked_fill_(~visible, -math.inf)
    of_block = scores.unflatten(-1, (-1, block)).amax(-1)  # [B, Hkv, G, R, blocks]
    # log Σ exp(scores), without exp: it is several times slower than a softmax on a CPU.
    lse = of_block.amax(-1) - scores.softmax(-1).amax(-1).log()
    log_weight = (of_block[..., :columns] - lse[..., None]).amax(2)
    return log_weight.masked_fill(~before, torch.finfo(k.dtype).min).log_softmax(-1), before
