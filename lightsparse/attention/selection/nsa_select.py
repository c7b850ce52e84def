"""NSA's selection: which blocks of tokens a query reads, by the attention it pays to their summaries.

The importance of a block is the compressed branch's probability of the summaries that overlap it, each as often as it
has chunks of `stride` tokens there (Yuan et al. 2025, arXiv 2502.11089, eq. 9), added up over the query heads that
share the keys (eq. 10), so that these read the same blocks.
A summary on the border of two blocks counts for both alike. Where it has nearly all of the attention, these two differ
by no more than rounding does, and decoding may choose the other one of them than the pass over the whole text.

Shapes: B batch, H query heads, Hkv key/value heads, G = H / Hkv, R queries, S summaries, J blocks of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightsparse.attention.pooling.nsa_compress import complete, last_tokens, whole
from lightsparse.attention.selection.router import best, listed
from lightsparse.attention.selection.row_parts import slices
from lightsparse.kernels import chunk_sizes
from lightsparse.patterns.mask import document_starts

_SCORES, _WIDE_SCORES = 1 << 17, 1 << 28  # in memory at once; the second where chunks are wide (1 GiB in fp32)


@dataclass(frozen=True)
class Selector:
    """The choice of `top` blocks: the document's `first` ones, the own and the `local` − 1 before it, and the best."""

    compress_block: int  # tokens of a summary
    stride: int  # tokens from one summary to the next; divides compress_block and block
    block: int  # tokens of a block to select
    top: int
    first: int
    local: int

    def importance(self, p: Tensor, blocks: int) -> Tensor:
        """Probabilities of summaries [.., S] → of blocks [.., blocks]; for 32, 16 and 64 tokens weighted 1, 2, 2, 2, 1.

        No summary may reach beyond the last block.
        """
        overlap, per_block = self.compress_block // self.stride, self.block // self.stride
        chunks = blocks * per_block
        p = F.pad(p, (overlap - 1, chunks - p.shape[-1]))
        of_chunks = p[..., :chunks]  # of the summary that ends with the chunk
        for later in range(1, overlap):
            of_chunks = of_chunks + p[..., later : later + chunks]
        return of_chunks.unflatten(-1, (blocks, per_block)).sum(-1)

    def table(self, q: Tensor, keys: Tensor, tokens: Tensor, length: int, documents: Tensor | None) -> Tensor:
        """Blocks of queries [B, H, R, D] at `tokens` [R], ascending: int32 [B, Hkv, R, min(top, J)], −1 padded.

        keys       [B, Hkv, S, D]: summaries, S ≥ those complete at the last of the tokens; their dtype is that of the
                   scores
        length     tokens of the sequence
        documents  int32 [B, length] or None
        """
        batch, heads, rows, _ = q.shape
        starts = None if documents is None else document_starts(documents)
        apart = None if documents is None else whole(keys.shape[2], self.compress_block, self.stride, documents)
        width = min(self.top, -(-length // self.block))
        scores = chunk_sizes.at_once(q.device, _SCORES, _WIDE_SCORES)
        at_once = max(scores // max(batch * heads * keys.shape[2], 1), 1)
        tables = []
        for part in slices(rows, at_once):
            t = tokens[part]
            end = length if chunk_sizes.is_wide(q.device) else int(t[-1]) + 1
            of_blocks = self._importance_of(q[:, :, part], keys, t, end, documents, apart)
            begins = None if starts is None else starts[:, t]
            tables.append(self._chosen(of_blocks, t, begins, width))
        return torch.cat(tables, 2) if tables else tokens.new_empty(batch, keys.shape[1], 0, width, dtype=torch.int32)

    def _importance_of(
        self, q: Tensor, keys: Tensor, t: Tensor, end: int, documents: Tensor | None, within: Tensor | None
    ) -> Tensor:
        """[B, Hkv, R, J up to token `end`], after one softmax per query head over all summaries that it sees.

        end  a bound on the places t: nothing behind it is looked at
        """
        count = min(complete(end, self.compress_block, self.stride), keys.shape[2])
        scores = torch.einsum(
            "bhgrd,bhsd->bhgrs", q.to(keys.dtype).unflatten(1, (keys.shape[1], -1)), keys[:, :, :count]
        ) / math.sqrt(q.shape[-1])
        last = last_tokens(count, self.compress_block, self.stride, t.device)
        sees = (last <= t[:, None])[None]
        if documents is not None and within is not None:
            sees = sees & (documents[:, t, None] == documents[:, None, last]) & within[:, None, :count]
        p = scores.masked_fill_(~sees[:, None, None], -math.inf).softmax(-1).nan_to_num_(0.0)  # of nothing seen: 0
        return self.importance(p.sum(2), -(-end // self.block))

    def _chosen(self, importance: Tensor, t: Tensor, begins: Tensor | None, width: int) -> Tensor:
        """begins: int32 [B, R], the first token of each query's document; None = 0."""
        column = torch.arange(importance.shape[-1], device=t.device)
        own = (t // self.block)[:, None]
        origin = 0 if begins is None else (begins.long() // self.block)[..., None]
        since = (column - origin).expand(1 if begins is None else len(begins), len(t), -1)[:, None]  # document's block
        read = (since >= 0) & (column <= own)
        forced = read & ((since < self.first) | (column > own - self.local))
        others = self.top - self.first - self.local
        chosen = forced.expand(*importance.shape[:2], -1, -1)
        if others:
            chosen = chosen | best(importance, (read & ~forced).expand(importance.shape), others)
        return listed(chosen, width)
