"""NSA's compression: blocks of `block` tokens, one every `stride` of them, each to one summary key and value.

Summary i stands for tokens i · stride … i · stride + block − 1 and can be read once the last of them is past (Yuan et
al. 2025, arXiv 2502.11089, eq. 7). One that would cross a document's border is never read.

Blocks overlap in whole chunks of `stride` tokens. What a chunk adds to each block that it is part of is computed once
(`parts`) and added up afterwards (`joined`): no block is ever copied out, and ranks exchange parts in place of tokens.

Shapes: B batch, H key/value heads, N tokens, C chunks, S summaries, D head dim, F hidden width, O chunks to a block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightsparse.patterns import BlockLayout, ElementMask
from lightsparse.patterns.layout import no_dense_rows
from lightsparse.patterns.mask import ALWAYS, document_starts


def complete(tokens: int, block: int, stride: int) -> int:
    """Summaries whose last token is among the first `tokens`."""
    return max((tokens - block) // stride + 1, 0)


class MeanCompressor(nn.Module):
    """The mean of the block's tokens."""

    def __init__(self, block: int, stride: int):
        super().__init__()
        self.stride, self.overlap = stride, block // stride

    def parts(self, x_BHND: Tensor) -> Tensor:
        """[B, H, C, D] of tokens, padded to whole chunks."""
        return _in_chunks(x_BHND, self.stride).mean(3) / self.overlap

    def joined(self, parts_BHCD: Tensor) -> Tensor:
        """[B, H, S, D]"""
        return _added([parts_BHCD] * self.overlap)


class MlpCompressor(nn.Module):
    """mean(x) + W₂ · gelu(W₁ · [x₁ + e₁; …; x_l + e_l] + b), one for all heads; e is the position within the block.

    The paper says "a learnable MLP with intra-block position encoding" and no more; width, activation and the mean,
    around which the MLP starts small, are ours: random summaries choose random blocks, and nothing teaches the selected
    branch to compare keys that it does not see. No bias at the end: added to every key alike, it would leave the
    softmax as it is.
    """

    def __init__(self, block: int, stride: int, dim: int, hidden: int):
        super().__init__()
        self.stride, self.overlap = stride, block // stride
        self.position = nn.Parameter(torch.randn(block, dim) * 0.02)
        self.first = nn.Linear(block * dim, hidden)
        self.second = nn.Linear(hidden, dim, bias=False)
        nn.init.normal_(self.first.weight, std=math.sqrt(1 / self.first.in_features))
        nn.init.normal_(self.second.weight, std=0.1 * math.sqrt(2 / hidden))  # a tenth of the keys they stand for
        nn.init.zeros_(self.first.bias)

    def parts(self, x_BHND: Tensor) -> Tensor:
        """What each chunk adds to the O blocks that it is part of, and to their means: [B, H, C, O · F + D] of tokens,
        padded to chunks.
        """
        chunks = _in_chunks(x_BHND, self.stride)
        weight = self.first.weight.to(chunks.dtype).unflatten(1, (self.overlap, -1)).transpose(0, 1)
        return torch.cat([F.linear(chunks.flatten(3), weight.flatten(0, 1)), chunks.mean(3) / self.overlap], -1)

    def joined(self, parts: Tensor) -> Tensor:
        """[B, H, S, D]"""
        dtype, width = parts.dtype, self.overlap * self.first.out_features
        mean = _added([parts[..., width:]] * self.overlap)
        shift = F.linear(self.position.flatten().to(dtype), self.first.weight.to(dtype), self.first.bias.to(dtype))
        by_place = parts[..., :width].unflatten(-1, (self.overlap, -1)).unbind(-2)
        return mean + F.linear(F.gelu(_added(list(by_place)) + shift), self.second.weight.to(dtype))


def _in_chunks(x_BHND: Tensor, stride: int) -> Tensor:
    """[B, H, C, stride, D], zeros behind the last token."""
    return F.pad(x_BHND, (0, 0, 0, -x_BHND.shape[2] % stride)).unflatten(2, (-1, stride))


def _added(of_place: list[Tensor]) -> Tensor:
    """of_place[o] holds what chunk c adds to block c − o: the sums of all blocks, [B, H, S, …]."""
    blocks = max(of_place[0].shape[2] - len(of_place) + 1, 0)
    total = of_place[0][:, :, :blocks]
    for place, parts in enumerate(of_place[1:], start=1):
        total = total + parts[:, :, place : place + blocks]
    return total


def last_tokens(count: int, block: int, stride: int, device: torch.device) -> Tensor:
    """Of each summary: int64 [count]."""
    return torch.arange(count, device=device) * stride + block - 1


def whole(count: int, block: int, stride: int, documents: Tensor) -> Tensor:
    """Summaries within one document: bool [B, count]; documents [B, N]."""
    last = last_tokens(count, block, stride, documents.device)
    return documents[:, last - block + 1] == documents[:, last]


def summary_layout(
    tokens: Tensor, count: int, *, block: int, stride: int, tile: int, documents: Tensor | None
) -> BlockLayout:
    """What queries at `tokens` [R], ascending, read of `count` summaries: all that are complete and of their document.

    tile       summaries per key block; queries per row, too, if they come in whole tiles of neighbours, which 1 does
               not ask for
    documents  int32 [B, N] or None
    """
    device, q_block = tokens.device, tile if bool((tokens[::tile] % tile == 0).all()) else 1
    last = last_tokens(count, block, stride, device).to(torch.int32)[None]
    visible_from, q_doc, kv_doc = last, None, None
    row_end = tokens[torch.arange(q_block - 1, len(tokens) + q_block - 1, q_block).clamp(max=len(tokens) - 1)]
    seen = ((row_end + 1 - block) // stride + 1).clamp(0, count)  # `complete`
    stop = (seen + tile - 1) // tile  # blocks of summaries before this are read
    start = torch.zeros_like(stop)[None]
    if documents is not None:
        visible_from = torch.where(whole(count, block, stride, documents), last, ALWAYS)
        q_doc, kv_doc = documents[:, tokens], documents[:, last[0].long()]
        first_of_document = document_starts(documents)[:, tokens[::q_block]].long()
        start = (first_of_document + stride - 1) // stride // tile
    width = max(int((stop - start).max()), 1)
    table = start[..., None] + torch.arange(width, device=device)
    table = torch.where(table < stop[:, None], table, -1).to(torch.int32)[:, None]
    mask = ElementMask(
        q_pos=tokens.to(torch.int32)[None],
        visible_from=visible_from,
        visible_until=torch.full_like(last, ALWAYS),
        q_doc=q_doc,
        kv_doc=kv_doc,
    )
    return BlockLayout(table, q_block, tile, mask, no_dense_rows(device))
