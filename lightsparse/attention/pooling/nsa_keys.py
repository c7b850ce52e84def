"""NSA's keys and values: each branch's own, or the layer's for all of them, and what decoding has to keep of them.

Shapes: B batch, Hkv key/value heads, n tokens here, S summaries, D head dim, E embed_dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.attention.pooling.block_means import gather_block_means
from lightsparse.attention.pooling.nsa_compress import MeanCompressor, MlpCompressor, complete, last_tokens
from lightsparse.patterns.mask import document_starts


class KeysValues(NamedTuple):
    k: Tensor  # [B, Hkv, n, D]
    v: Tensor


class Projections(nn.Module):
    """A branch's own keys and values of the layer's input."""

    def __init__(self, shape: AttentionShape):
        super().__init__()
        self.shape = shape
        self.k = nn.Linear(shape.embed_dim, shape.kv_heads * shape.head_dim, bias=False)
        self.v = nn.Linear(shape.embed_dim, shape.kv_heads * shape.head_dim, bias=False)
        for linear in (self.k, self.v):  # as large as the layer's own ones at the start
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x_BNE: Tensor) -> KeysValues:
        """Before any rotation."""
        k, v = (linear(x_BNE).unflatten(-1, (self.shape.kv_heads, -1)).transpose(1, 2) for linear in (self.k, self.v))
        return KeysValues(k, v)

    def exactly(self, x_BNE: Tensor) -> KeysValues:
        """The same in at least fp32, whatever the parameters and autocast are: for what chooses."""
        dtype = torch.promote_types(x_BNE.dtype, torch.float32)
        with torch.autocast(x_BNE.device.type, enabled=False):
            k, v = (F.linear(x_BNE.to(dtype), linear.weight.to(dtype)) for linear in (self.k, self.v))
        return KeysValues(*(t.unflatten(-1, (self.shape.kv_heads, -1)).transpose(1, 2) for t in (k, v)))


class SummaryKeys(nn.Module):
    """The compressed branch's keys and values: those of all complete summaries of the sequence, at least fp32.

    With `own` they are made of projections of x; the summary's key is then turned by the position of its last token.
    Otherwise they are made of the layer's k and v, and these keys are already turned, each by its own position.
    """

    def __init__(self, shape: AttentionShape, block: int, stride: int, hidden: int | None, own: bool):
        """hidden: width of the MLP; None = means."""
        super().__init__()
        self.layer, self.block, self.stride = shape.layer, block, stride
        self.own = Projections(shape) if own else None

        def compressor() -> MeanCompressor | MlpCompressor:
            if hidden is None:
                return MeanCompressor(block, stride)
            return MlpCompressor(block, stride, shape.head_dim, hidden)

        self.of_keys, self.of_values = compressor(), compressor()

    @torch.compiler.disable  # how many there are depends on values
    def forward(self, k: Tensor, v: Tensor, x: Tensor, n: int, ctx: SequenceContext) -> KeysValues:
        """k, v [B, Hkv, ·, D] of all tokens so far, or of this rank's, and x of the new ones; n tokens so far."""
        raw = KeysValues(k, v) if self.own is None else self.own.exactly(x)
        state = {} if ctx.states is None else ctx.states[self.layer]
        earlier, done = None, 0
        if ctx.q_start and "summary_k" in state:
            earlier = KeysValues(state["summary_k"], state["summary_v"])
            done = earlier.k.shape[2]
        if self.own is None:
            raw = KeysValues(*(t[:, :, done * self.stride :] for t in raw))
        elif ctx.q_start:
            raw = self._with_tail(raw, state, done, ctx.q_start)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(k.dtype, torch.float32)
            parts = [f.parts(t.to(dtype)) for f, t in zip((self.of_keys, self.of_values), raw, strict=True)]
            sizes = [part.shape[-1] for part in parts]
            of_both = (
                gather_block_means(torch.cat(parts, -1), ctx.shard, self.stride) if ctx.shard is not None else None
            )
            if of_both is not None:
                parts = list(of_both.split(sizes, -1))
            new_k, new_v = self.of_keys.joined(parts[0]), self.of_values.joined(parts[1])
            count = complete(n, self.block, self.stride)
            new_k, new_v = (t[:, :, : count - done] for t in (new_k, new_v))  # without those of the padding
            if self.own is not None and ctx.rotary is not None:
                new_k = ctx.rotary(new_k, self._positions(done, count, ctx.documents, x.device))
        summaries = KeysValues(new_k, new_v)
        if earlier is not None:
            summaries = KeysValues(torch.cat([earlier.k, new_k], 2), torch.cat([earlier.v, new_v], 2))
        if ctx.states is not None:
            state["summary_k"], state["summary_v"] = summaries.k.detach(), summaries.v.detach()
            if self.own is not None:
                first = (count - done) * self.stride
                state["summary_tail"] = torch.cat([t[:, :, first:] for t in raw], -1).detach().contiguous()
        return summaries

    def _with_tail(self, raw: KeysValues, state: dict[str, Tensor], done: int, start: int) -> KeysValues:
        """The new tokens, behind those that are not yet in all of their summaries."""
        tail = state.get("summary_tail")
        if tail is None or tail.shape[2] != start - done * self.stride:
            raise ValueError(
                f"ctx.q_start is {start} but ctx.states holds no compressed keys of {start} tokens for layer "
                f"{self.layer}; decode with the states of the passes that read those tokens, one KVCache per layer"
            )
        k, v = tail.chunk(2, -1)
        return KeysValues(torch.cat([k, raw.k], 2), torch.cat([v, raw.v], 2))

    def _positions(self, first: int, stop: int, documents: Tensor | None, device: torch.device) -> Tensor:
        """Of the last tokens of summaries first … stop − 1: int64 [B|1, stop − first]."""
        last = last_tokens(stop, self.block, self.stride, device)[first:]
        return last[None] if documents is None else last - document_starts(documents)[:, last].long()


class WindowKeys(nn.Module):
    """The window's own keys and values; decoding keeps those of the blocks that a later query may still read."""

    def __init__(self, shape: AttentionShape, window: int, block: int):
        super().__init__()
        self.layer, self.window, self.block = shape.layer, window, block
        self.own = Projections(shape)

    def forward(self, x: Tensor, ctx: SequenceContext) -> tuple[KeysValues, SequenceContext]:
        """Keys and values of the tokens so far, and the context that says which blocks of them are left."""
        k, v = self.own(x)
        if ctx.rotary is not None:
            k = ctx.rotary(k, ctx.positions)
        if ctx.states is None:
            return KeysValues(k, v), ctx
        state, n = ctx.states[self.layer], ctx.q_start + k.shape[2]
        if ctx.q_start:
            if "window" not in state:
                raise ValueError(
                    f"ctx.q_start is {ctx.q_start} but ctx.states holds no keys of the window for layer {self.layer}; "
                    "decode with the states of the passes that read those tokens, one KVCache per layer"
                )
            old_k, old_v = state["window"].chunk(2, -1)
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        first = (n - k.shape[2]) // self.block  # block that k begins with
        next_first = max(n + 1 - self.window, 0) // self.block
        state["window"] = torch.cat([k, v], -1)[:, :, (next_first - first) * self.block :].detach().contiguous()
        cached_block_ids = torch.arange(first, -(-n // self.block), device=k.device) if first else None
        return KeysValues(k, v), replace(ctx, cached_block_ids=cached_block_ids)
