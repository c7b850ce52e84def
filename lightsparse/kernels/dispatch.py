"""One entry to all backends: each declares what it can do, the dispatcher refuses the rest and names the way out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from lightsparse.kernels import blocked_op, reference, sdpa
from lightsparse.kernels.dropout import Dropout
from lightsparse.patterns.layout import BlockLayout

log = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()
_preferred: ContextVar[str] = ContextVar("lightsparse_backend", default="auto")


@dataclass(frozen=True)
class Request:
    """What one call asks of a backend."""

    layout: BlockLayout
    bias: bool
    dropout: bool
    lse: bool
    nq: int
    nkv: int


@dataclass(frozen=True)
class Backend:
    """Capabilities, checked before any compute."""

    name: str
    block_bias: bool = True
    dropout: bool = True
    differentiable_lse: bool = True
    any_layout: bool = True  # otherwise only layouts that are dense

    def refusal(self, ask: Request) -> str | None:
        """Why it cannot serve the call, or None."""
        if not self.any_layout and not sdpa.is_dense(ask.layout):
            return "takes only layouts in which every query reads every key it may see"
        if ask.bias and not self.block_bias:
            return "takes no block_bias"
        if ask.dropout and not self.dropout:
            return "takes no dropout"
        if ask.lse and not self.differentiable_lse:
            return "returns no differentiable lse"
        return None


BACKENDS = {
    "reference": Backend("reference"),
    "blocked": Backend("blocked"),
    "sdpa": Backend("sdpa", block_bias=False, dropout=False, differentiable_lse=False, any_layout=False),
}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Calls with backend="auto" inside the block take this backend, or raise where it cannot serve them."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {name!r}; choose auto, {', '.join(BACKENDS)}")
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    block_bias: Tensor | None = None,
    dropout: Dropout | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs a layout allows; exact, one softmax per row.

    q           [B, H, Nq, D]
    k, v        [B, Hkv, Nkv, D]; H a multiple of Hkv (grouped queries)
    layout      BlockLayout: which key blocks each query block reads
    scale       multiplies q·k; default 1/√D
    block_bias  [B|1, H|Hkv|1, NQ, K]: added to the scores of that entry of the layout's table, differentiable
    dropout     Dropout(rate, keys) on the attention weights
    backend     auto | blocked | reference | sdpa
    return_lse  also return the log-sum-exp of each row's scores, [B, H, Nq] fp32, differentiable

    Returns out [B, H, Nq, D] in q's dtype; a row with nothing to read is 0 (lse −inf).
    Raises ValueError for shapes, dtypes or devices that do not fit, and for what the backend cannot do.
    """
    _check(q, k, v, layout, block_bias)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; choose auto, {', '.join(BACKENDS)}")
    ask = Request(layout, block_bias is not None, dropout is not None, return_lse, q.shape[2], k.shape[2])
    chosen = _preferred.get() if backend == "auto" else backend
    if chosen == "auto":
        chosen = "sdpa" if BACKENDS["sdpa"].refusal(ask) is None else "blocked"
    elif (reason := BACKENDS[chosen].refusal(ask)) is not None:
        raise ValueError(f"backend {chosen!r} {reason}; use backend=blocked")
    if (chosen, q.device.type) not in _said:
        _said.add((chosen, q.device.type))
        log.info("attention backend on %s: %s", q.device.type, chosen)

    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if chosen == "sdpa":
        return sdpa.attention(q, k, v, layout, scale)
    if chosen == "reference":
        out, lse = reference.attention(q, k, v, layout, scale, block_bias, dropout)
    else:
        out, lse = blocked_op.attention(q, k, v, layout, scale, block_bias, dropout, return_lse)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, bias: Tensor | None) -> None:
    if k.shape != v.shape or q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; they must be [B, H, Nq, D] and twice [B, Hkv, Nkv, D]"
        )
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % kv_heads:
        raise ValueError(
            f"q has {heads} heads and k has {kv_heads}; the query heads must be a multiple of the key/value heads"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating-point dtype")
    if (layout.num_queries, layout.num_keys) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the layout is for {layout.num_queries} queries and {layout.num_keys} keys; q has {q.shape[2]} and k {k.shape[2]}"
        )
    batch, of_heads = layout.kv_indices.shape[:2]
    if batch not in (1, q.shape[0]) or of_heads not in (1, kv_heads, heads):
        raise ValueError(
            f"the layout's table is for batch {batch} and {of_heads} heads; q, k have batch {q.shape[0]}, "
            f"{heads} and {kv_heads} heads, of which the table takes 1 or all"
        )
    if layout.kv_indices.device != q.device:
        raise ValueError(
            f"the layout is on {layout.kv_indices.device} and q on {q.device}; build it with device=q.device"
        )
    if bias is not None and (
        bias.shape[2:] != layout.kv_indices.shape[2:]
        or bias.shape[0] not in (1, q.shape[0])
        or bias.shape[1] not in (1, kv_heads, heads)
    ):
        raise ValueError(
            f"block_bias is {tuple(bias.shape)}; it must be [B|1, H|Hkv|1, NQ, K] with NQ, K = {tuple(layout.kv_indices.shape[2:])}"
        )
