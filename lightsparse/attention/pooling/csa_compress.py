"""Learned summaries of strides of tokens: one entry per stride, each of its channels a softmax-weighted mean.

DeepSeek-V4's compressor (CSA, eq. 9–12 of its report; HCA, eq. 20–23): with values C = x·W_C and gates Z = x·W_Z + B,
B learned per place in the stride, an entry is RMSNorm(Σ_j softmax_j(Z_j) ⊙ C_j). With overlap the softmax runs over the
tokens of this stride and of the one before, each with projections of its own. A stride is pooled once for either use,
to its weighted mean and the log of its weights' sum; two such parts give the softmax over both, so that a border
between ranks costs one part, not a stride of tokens.

With packed documents an entry belongs to the document of its stride's last token and pools tokens of that document
only. Tokens of a document that ends within a stride stand in no entry, as those of an unfinished stride.

Shapes: B batch, N tokens, E embed_dim, h heads, W width of a head, S strides, m tokens of a stride, C = h · W channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightsparse.attention.core import SequenceContext
from lightsparse.attention.pooling.strides_across_ranks import gather_strides, of_the_stride_before
from lightsparse.patterns.mask import document_starts

_STD = 0.02  # of new projections, as in the model's layers
_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Strides:
    """The whole strides of one pass that have to be pooled, on this rank.

    x          [B, S · m, E]
    inside     bool [B, S, m]: tokens of the document of the stride's last token; None = all are
    continues  bool [B|1, S]: the stride before is here too, and ends in the same document
    skip       leading strides that are there for the next one's sake only (decoding)
    """

    x: Tensor
    inside: Tensor | None
    continues: Tensor
    skip: int = 0


def entry_positions(count: int, stride: int, ctx: SequenceContext, device: torch.device) -> Tensor:
    """Place in its document of the first token that each entry may pool of its own stride: int64 [B|1, count]."""
    last = torch.arange(count, device=device) * stride + stride - 1
    if ctx.documents is None:
        return (last - (stride - 1))[None]
    return (last - _starts(ctx)[:, last] - (stride - 1)).clamp(min=0)


@torch.compiler.disable
def _starts(ctx: SequenceContext) -> Tensor:
    """First token of each token's document, once for the layers of a pass."""
    assert ctx.documents is not None
    if "document starts" not in ctx.layouts:
        ctx.layouts["document starts"] = document_starts(ctx.documents).long()
    return ctx.layouts["document starts"]


def entry_documents(count: int, stride: int, ctx: SequenceContext) -> Tensor | None:
    """Document of each of the sequence's first `count` entries: [B, count]."""
    return None if ctx.documents is None else ctx.documents[:, stride - 1 : count * stride : stride]


def own_strides(x: Tensor, stride: int, ctx: SequenceContext, *, first: int = 0, skip: int = 0) -> Strides:
    """The whole strides of x [B, n, E], tokens from stride `first` on (with ctx.shard: this rank's)."""
    count = x.shape[1] // stride
    if ctx.shard is None:
        ids = torch.arange(first, first + count, device=x.device)
        before = ids > first
    else:
        ids = ctx.shard.tokens[: count * stride : stride].to(x.device) // stride
        before = ids > 0
    x = x[:, : count * stride]
    if ctx.documents is None:
        return Strides(x, None, before[None], skip)
    tokens = ids[:, None] * stride + torch.arange(stride, device=x.device)
    last = ctx.documents[:, tokens[:, -1]]
    inside = ctx.documents[:, tokens] == last[..., None]
    previous = ctx.documents[:, (ids * stride - 1).clamp(min=0)]
    return Strides(x, inside, before & (previous == last), skip)


class Compressor(nn.Module):
    """x → entries, before any rotation.

    overlap  an entry pools its own stride and the one before, 2m tokens; otherwise its own
    """

    def __init__(self, embed_dim: int, heads: int, width: int, stride: int, *, overlap: bool):
        super().__init__()
        self.heads, self.stride, self.overlap = heads, stride, overlap
        series = 2 if overlap else 1  # with overlap first what the next stride's entry pools, then the own entry's
        self.value = nn.Linear(embed_dim, series * heads * width, bias=False)
        self.gate = nn.Linear(embed_dim, series * heads * width, bias=False)
        for linear in (self.value, self.gate):
            nn.init.normal_(linear.weight, std=_STD)
        self.position_bias = nn.Parameter(torch.zeros(series, stride, heads * width))
        self.norm = nn.Parameter(torch.ones(width))

    def forward(self, strides: Strides, ctx: SequenceContext) -> Tensor:
        """Entries [B, h, S − skip, W] in x's dtype, this rank's."""
        x = strides.x
        values, gates = (F.linear(x, linear.weight.to(x.dtype)) for linear in (self.value, self.gate))
        with torch.autocast(x.device.type, enabled=False):
            channels = self.position_bias.shape[-1]
            *halves, own = [
                self._pooled(of_values, of_gates, bias, strides.inside)
                for of_values, of_gates, bias in zip(
                    values.split(channels, -1), gates.split(channels, -1), self.position_bias, strict=True
                )
            ]
            entries = own[1]
            if halves:
                before = of_the_stride_before(torch.cat(halves[0], -1), self.stride, ctx.shard)
                log_sum, mean = before.split(channels, -1)
                log_sum = log_sum.masked_fill(~strides.continues[..., None], -torch.inf)
                entries = torch.lerp(mean, entries, torch.sigmoid(own[0] - log_sum))
            entries = entries[:, strides.skip :].unflatten(-1, (self.heads, -1)).transpose(1, 2)
            entries = F.rms_norm(entries, self.norm.shape, self.norm.to(entries.dtype), _EPS)
        return entries.to(x.dtype)

    def _pooled(self, values: Tensor, gates: Tensor, bias: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log of the summed weights and the weighted mean of each stride, [B, S, C] each, at least fp32."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        gates = gates.to(dtype).unflatten(1, (-1, self.stride)) + bias.to(dtype)
        if inside is not None:
            gates = gates.masked_fill(~inside[..., None], -torch.inf)
        mean = (gates.softmax(2) * values.to(dtype).unflatten(1, (-1, self.stride))).sum(2)
        return gates.logsumexp(2), mean


def compressed(compressor: Compressor, x: Tensor, ctx: SequenceContext, state: dict[str, Tensor], name: str) -> Tensor:
    """All entries of the sequence so far, [B, h, N // m, W], on every rank.

    state  what decoding keeps for the layer; takes in new entries and the tokens that later ones pool
    Raises ValueError when ctx.q_start > 0 and `state` is not that of the tokens before.
    """
    stride, keeps = compressor.stride, int(compressor.overlap)
    if ctx.states is None:
        entries = compressor(own_strides(x, stride, ctx), ctx)
        return gather_strides(entries, stride, ctx.shard)
    done, length = ctx.q_start // stride, ctx.q_start + x.shape[1]
    first = max(done - keeps, 0)
    if ctx.q_start:
        kept = tuple(state[key].shape[dim] if key in state else 0 for key, dim in ((name, 2), (f"{name}_x", 1)))
        if kept != (done, ctx.q_start - first * stride):
            raise ValueError(
                f"ctx.q_start is {ctx.q_start} but ctx.states holds no compressed entries of {ctx.q_start} tokens; "
                "decode with the states of the passes that read those tokens, one KVCache per layer"
            )
        x = torch.cat([state[f"{name}_x"], x], 1)
    whole = length // stride
    entries = state.get(name)
    if entries is None or whole > done:
        of = x[:, : (whole - first) * stride]
        new = compressor(own_strides(of, stride, ctx, first=first, skip=done - first), ctx).detach()
        entries = new if entries is None else torch.cat([entries, new], 2)
    state[name] = entries
    state[f"{name}_x"] = x[:, (max(whole - keeps, 0) - first) * stride :].detach()
    return entries
