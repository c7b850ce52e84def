"""What a layout keeps of dense attention on given q, k and v: the share of its weights, and the error of its output.

Dense attention is the softmax over all tokens a query may see in its document. A layout that keeps the share m of a
query's weights changes its output by (1 − m) times the difference between the mean values outside and inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.analysis.rows import chunks, dense_would_read, evenly, read_by
from lightsparse.patterns import BlockLayout


@dataclass(frozen=True)
class AgainstDense:
    """Of sampled queries, per sample and head."""

    queries: Tensor  # int64 [R]: which
    mass: Tensor  # fp32 [B, H, R]: share of dense attention's weights on pairs the layout reads
    error: Tensor | None  # fp32 [B, H, R]: |output − dense output| ÷ |dense output|; None without v


@torch.no_grad()
def against_dense(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    v: Tensor | None = None,
    *,
    queries: int | Tensor = 64,
    scale: float | None = None,
) -> AgainstDense:
    """Compare a layout with dense attention on q [B, H, Nq, D] and k, v [B, Hkv, N, D], for sampled queries.

    queries  how many, evenly spaced, or their indices, int64 [R]
    scale    multiplies q·k; default 1/√D
    Computes in fp32 with memory O(chunk · N): never N × N. A query that may see nothing has mass 1 and error 0.
    Raises ValueError for a layout with keys beside the tokens: dense attention has no weight for those.
    """
    if layout.num_keys != layout.num_tokens:
        raise ValueError(
            f"the layout has {layout.num_keys} keys for {layout.num_tokens} tokens; attention mass is defined over "
            "tokens, so a layout with summaries has none"
        )
    if (layout.num_queries, layout.num_keys) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the layout is for {layout.num_queries} queries and {layout.num_keys} keys; "
            f"q has {q.shape[2]} and k {k.shape[2]}"
        )
    sampled = evenly(layout, queries) if isinstance(queries, int) else queries
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    keys, values = (None if x is None else x.float().repeat_interleave(group, 1) for x in (k, v))
    assert keys is not None
    masses, errors = [], []
    for some in chunks(sampled, q.shape[0] * q.shape[1] * k.shape[2]):
        scores = q[:, :, some].float() @ keys.mT * scale
        visible = dense_would_read(layout, some)
        read = read_by(layout, some) & visible
        read = read.repeat_interleave(q.shape[1] // read.shape[1], 1)
        dense = _softmax(scores, visible)
        mass = (dense * read).sum(-1)
        masses.append(torch.where(visible.any(-1), mass, 1.0))
        if values is not None:
            expected = dense @ values
            off = (_softmax(scores, read) @ values - expected).norm(dim=-1)
            errors.append(torch.where(off > 0, off / expected.norm(dim=-1), 0.0))
    return AgainstDense(sampled, torch.cat(masses, -1), torch.cat(errors, -1) if errors else None)


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed entries of each row; zero in a row without any."""
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.where(allowed.any(-1, keepdim=True), weights, 0.0)
