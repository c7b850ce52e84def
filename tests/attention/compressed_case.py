"""CSA and HCA written out from their definition over a dense mask, to be compared with."""

from __future__ import annotations

import torch
from battery import ROTARY, Inputs, documents_at
from torch import Tensor

from lightsparse.attention.csa import CsaAttention
from lightsparse.attention.pooling.compressed import CompressedAttention
from lightsparse.attention.pooling.csa_compress import Compressor
from lightsparse.patterns.mask import document_starts


def entries_of(compressor: Compressor, x: Tensor, ids: Tensor) -> Tensor:
    """[B, h, S, W]: each entry by itself, from the tokens that it pools one by one."""
    m, (*before, own) = compressor.stride, range(len(compressor.position_bias))
    c, z = (
        linear(x).unflatten(-1, (len(compressor.position_bias), -1)) for linear in (compressor.value, compressor.gate)
    )
    samples = []
    for b in range(len(x)):
        entries = []
        for last in range(m - 1, x.shape[1], m):
            slots = [(j, own) for j in range(last - m + 1, last + 1)]
            slots += [(j, series) for series in before for j in range(max(last - 2 * m + 1, 0), last - m + 1)]
            slots = [(j, series) for j, series in slots if ids[b, j] == ids[b, last]]
            gates = torch.stack([z[b, j, series] + compressor.position_bias[series, j % m] for j, series in slots])
            pooled = (gates.softmax(0) * torch.stack([c[b, j, series] for j, series in slots])).sum(0)
            pooled = pooled.unflatten(0, (compressor.heads, -1))
            entries.append(pooled * (pooled.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * compressor.norm)
        samples.append(torch.stack(entries, 1))
    return torch.stack(samples)


def turned(entries: Tensor, m: int, ids: Tensor) -> Tensor:
    """By the place in its document of the first token of the own stride that an entry may pool."""
    last = torch.arange(m - 1, entries.shape[2] * m, m)
    return ROTARY.rotated(entries, (last - document_starts(ids).long()[:, last] - m + 1).clamp(min=0))


def written_out(core: CompressedAttention, given: Inputs, documents: Tensor | None = None):
    """(output, the indexer's loss or None)."""
    (q, x), (n, m) = (given.q, given.x), (given.q.shape[2], core.stride)
    ids = documents_at(n, batch=len(x)) if documents is None else documents
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (given.k, given.v))
    entries = entries_of(core.compressor, x, ids)
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (turned(entries, m, ids), entries))
    near, read = read_by_definition(core, given, documents)
    logits = torch.cat([q @ k.mT, q @ keys.mT], -1) / q.shape[-1] ** 0.5
    logits = logits.masked_fill(~torch.cat([near, read], -1)[:, None], -torch.inf)
    sink = core.sink[:, None, None].expand(len(q), -1, n, 1)
    weights = torch.cat([logits, sink.to(logits.dtype)], -1).softmax(-1)[..., :-1]
    out = weights @ torch.cat([v, values], 2)
    if not isinstance(core, CsaAttention):
        return out, None
    scores = index_scores(core, x.detach(), ids)
    share, some = weights[..., n:].detach().sum(1), read.any(-1)
    share = share[some] / share[some].sum(-1, keepdim=True)
    loss = (torch.xlogy(share, share) - share * scores[some].masked_fill(~read[some], -1e9).log_softmax(-1)).sum(-1)
    return out, core.csa.index_weight * loss.mean()


def read_by_definition(core: CompressedAttention, given: Inputs, documents: Tensor | None = None):
    """What each query reads: tokens, bool [B, N, N], and entries, bool [B, N, S]."""
    (n, m), x, window = (given.x.shape[1], core.stride), given.x, core.options.window
    ids = documents_at(n, batch=len(x)) if documents is None else documents
    i, last = torch.arange(n), torch.arange(m - 1, n, m)
    near = (i <= i[:, None]) & (i > i[:, None] - window) & (ids[:, None] == ids[:, :, None])
    read = (last <= i[:, None]) & (ids[:, None, last] == ids[:, :, None])
    if isinstance(core, CsaAttention) and not core.dense_now:
        scores = index_scores(core, x.detach(), ids).masked_fill(~read, -torch.inf)
        best = scores.topk(min(core.csa.top_k, len(last))).indices
        read = torch.zeros_like(read).scatter(-1, best, True) & read
    return near, read


def index_scores(core: CsaAttention, x: Tensor, ids: Tensor) -> Tensor:
    """[B, N, S]."""
    indexer, n = core.indexer, x.shape[1]
    positions = torch.arange(n) - document_starts(ids).long()
    q = ROTARY.rotated(indexer.query(x).unflatten(-1, (indexer.heads, -1)).transpose(1, 2), positions)
    keys = turned(entries_of(indexer.compressor, x, ids), core.stride, ids)
    weight = indexer.weight(x).mT[..., None] / (indexer.heads * q.shape[-1]) ** 0.5
    return (weight * (q @ keys.mT).relu()).sum(1)
