"""NSA written out from the paper's equations, one loop per block, and what its tests share."""

from __future__ import annotations

import math

import torch
from battery import Inputs, Shape, context, documents_at
from torch import Tensor

from lightsparse.attention.core import AttentionResult, AttentionShape
from lightsparse.attention.nsa import BRANCHES, NsaAttention, NsaConfig
from lightsparse.attention.pooling.nsa_compress import MlpCompressor

SMALL = NsaConfig().small()


def make(shape: Shape, *, seed: int = 0, context: int | None = None, **fields) -> NsaAttention:
    """In evaluation mode, scaled down like the battery's."""
    torch.manual_seed(seed)
    config = NsaConfig(**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__} | fields)
    embed = shape.heads * shape.dim
    return NsaAttention(config, AttentionShape(shape.heads, shape.kv_heads, shape.dim, embed, context=context)).eval()


def run(core: NsaAttention, given: Inputs, documents: Tensor | None = None) -> AttentionResult:
    return core(*given.tensors()[:3], x=given.x, ctx=context(given.x.shape[1], documents))


def only(core: NsaAttention, *branches: str) -> NsaAttention:
    """The same with gates of 1 for these branches and 0 for the others."""
    with torch.no_grad():
        core.gate.weight.zero_()
        for branch, bias in zip(BRANCHES, core.gate.bias.view(len(BRANCHES), -1), strict=True):
            bias.fill_(math.inf if branch in branches else -math.inf)
    return core


def softmax_under(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """allowed: bool [B|1, H|Hkv|1, N, keys]; a row without a key gives 0."""
    heads = q.shape[1]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    if allowed.shape[1] > 1:
        allowed = allowed.repeat_interleave(heads // allowed.shape[1], 1)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf)
    return torch.where(allowed.any(-1, keepdim=True), scores, 0.0).softmax(-1).masked_fill(~allowed, 0.0) @ v


def squeezed(of: MlpCompressor | torch.nn.Module, x: Tensor, block: int, stride: int) -> Tensor:
    """Eq. 7: φ of every block [B, H, S, D]."""
    found = []
    for start in range(0, x.shape[2] - block + 1, stride):
        tokens = x[:, :, start : start + block]
        if isinstance(of, MlpCompressor):
            hidden = torch.nn.functional.gelu(of.first((tokens + of.position).flatten(2)))
            found.append(tokens.mean(2) + of.second(hidden))
        else:
            found.append(tokens.mean(2))
    return torch.stack(found, 2) if found else x[:, :, :0]


def written_out(core: NsaAttention, given: Inputs, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(output, bool [B, Hkv, N, blocks] of the blocks chosen), with keys and values shared by the branches."""
    of, (q, k, v, x) = core.options, given.tensors()
    n, kv_heads = q.shape[2], k.shape[1]
    t, ids = torch.arange(n), documents_at(n, batch=len(q)) if documents is None else documents
    same = ids[:, None, :, None] == ids[:, None, None]  # [B, 1, N, N]

    small_k, small_v = (
        squeezed(f, y, of.compress_block, of.compress_stride)
        for f, y in ((core.summaries.of_keys, k), (core.summaries.of_values, v))
    )
    first = torch.arange(small_k.shape[2]) * of.compress_stride
    last = first + of.compress_block - 1
    sees = (last <= t[:, None]) & same[..., last] & same[..., first]
    compressed = softmax_under(q, small_k, small_v, sees)

    # Eq. 9 and 10: as many chunks as a summary and a block have in common, and the sum over the heads of a group.
    blocks = torch.arange(-(-n // of.select_block))
    begin, end = blocks * of.select_block, (blocks + 1) * of.select_block
    common = torch.minimum(last[:, None] + 1, end) - torch.maximum(first[:, None], begin)
    keys = small_k.repeat_interleave(q.shape[1] // kv_heads, 1)
    scores = (q @ keys.mT / math.sqrt(q.shape[-1])).detach().masked_fill(~sees, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0).unflatten(1, (kv_heads, -1)).sum(2)
    importance = p @ (common.clamp(min=0) / of.compress_stride).to(p.dtype)
    own, origin = (t // of.select_block)[:, None], first_tokens(ids)[..., None] // of.select_block
    readable = ((blocks >= origin) & (blocks <= own))[:, None]
    forced = readable & (((blocks < origin + of.first)[:, None]) | (blocks > own - of.local))
    ranked = importance.masked_fill(~readable, -torch.inf).masked_fill(forced, torch.inf)
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen.scatter_(-1, ranked.topk(min(of.top_n, len(blocks))).indices, True).logical_and_(readable)

    causal = (t <= t[:, None]) & same
    selected = softmax_under(q, k, v, chosen[..., t // of.select_block] & causal)
    window = softmax_under(q, k, v, (t > t[:, None] - of.window) & causal)
    gates = torch.nn.functional.linear(x, core.gate.weight, core.gate.bias).sigmoid().unflatten(-1, (3, -1))
    g = gates.permute(2, 0, 3, 1)[..., None]
    return g[0] * compressed + g[1] * selected + g[2] * window, chosen


def first_tokens(ids: Tensor) -> Tensor:
    """Index of the first token of each token's document: int64 [B, N]."""
    return torch.stack([torch.tensor([row.tolist().index(value) for value in row.tolist()]) for row in ids])


def as_map(table: Tensor, blocks: int) -> Tensor:
    """int32 [B, H, N, K], −1 padded → bool [B, H, N, blocks]."""
    chosen = torch.zeros(*table.shape[:3], blocks + 1, dtype=torch.bool)
    return chosen.scatter_(3, torch.where(table < 0, blocks, table).long(), True)[..., :-1]
