"""One entry to all backends: each says what it can do, the dispatcher refuses the rest and names the way out.

State of the process: `_backend_of_process`, set by `set_backend`; `_preferred`, a ContextVar set by `use_backend`; and
`_logged`, the (backend, device) pairs whose choice the log has told.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lightsparse.kernels import flex, sdpa
from lightsparse.kernels.argument_check import check_arguments
from lightsparse.kernels.dropout import Dropout
from lightsparse.kernels.native import call as native_call
from lightsparse.kernels.reference import reference_attention
from lightsparse.kernels.torch_ops.blocked import blocked_attention
from lightsparse.kernels.torch_ops.per_query import per_query_attention
from lightsparse.patterns.layout import BlockLayout

log = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()
_backend_of_process = "auto"  # no ContextVar: recomputation in the backward may run in a thread of autograd's own
_preferred: ContextVar[str | None] = ContextVar("lightsparse_backend", default=None)


@dataclass(frozen=True)
class Request:
    """What one call asks of a backend."""

    layout: BlockLayout
    bias: bool
    dropout: bool
    lse: bool
    q: Tensor  # for its device, dtype and shape
    kv_heads: int
    gradients: bool


@dataclass(frozen=True)
class Backend:
    """A backend's functions of (q, k, v, layout, scale, bias, dropout), and what it can do, checked before any compute.

    with_lse  → out, lse, both differentiable; None where it has no differentiable lse
    alone     → out; None: that of with_lse
    limits    why it cannot serve a call for reasons of its own, or None
    """

    with_lse: Callable[..., tuple[Tensor, Tensor]] | None
    alone: Callable[..., Tensor] | None = None
    limits: Callable[[Request], str | None] = lambda _: None
    block_bias: bool = True
    dropout: bool = True
    explicit_mask: bool = True  # layout.mask.dense

    def refusal(self, ask: Request) -> str | None:
        """Why it cannot serve the call, or None."""
        if ask.bias and not self.block_bias:
            return "takes no block_bias"
        if ask.dropout and not self.dropout:
            return "takes no dropout"
        if ask.lse and self.with_lse is None:
            return "returns no differentiable lse"
        if ask.layout.mask.dense is not None and not self.explicit_mask:
            return "takes no mask.dense"
        return self.limits(ask)


def _sdpa_limits(ask: Request) -> str | None:
    return None if sdpa.is_dense(ask.layout) else "takes only layouts in which every query reads every key it may see"


def _per_query_limits(ask: Request) -> str | None:
    rows = ask.layout.q_block
    return None if rows == 1 else f"takes layouts with a row per query (q_block = 1), and this one has {rows}"


def _native_limits(ask: Request) -> str | None:
    if ask.q.device.type != "cpu":
        return f"runs on CPU only, and the tensors are on {ask.q.device.type}"
    if ask.q.dtype not in native_call.DTYPES:
        return f"takes torch.float32 and torch.bfloat16, not {ask.q.dtype}"
    return None if native_call.available() else "could not be built here (the log says why)"


def _flex_limits(ask: Request) -> str | None:
    return flex.refusal(ask.q, ask.layout, gradients=ask.gradients, lse=ask.lse)


def _triton_limits(ask: Request) -> str | None:
    if find_spec("triton") is None:
        return "needs the package triton, which PyTorch for CUDA brings along"
    from lightsparse.kernels.triton.attention import refusal

    return refusal(ask.q, ask.layout, ask.kv_heads)


def _triton_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lightsparse.kernels.triton.attention import triton_attention  # not everywhere is there a triton

    return triton_attention(*arguments)


BACKENDS = {
    "reference": Backend(reference_attention),
    "blocked": Backend(blocked_attention),
    "native": Backend(native_call.native_attention, limits=_native_limits, explicit_mask=False),
    "per_query": Backend(per_query_attention, limits=_per_query_limits, explicit_mask=False),
    "flex": Backend(flex.flex_with_lse, flex.flex_alone, _flex_limits, block_bias=False, dropout=False),
    "triton": Backend(_triton_attention, limits=_triton_limits, explicit_mask=False),
    "sdpa": Backend(None, sdpa.sdpa_attention, _sdpa_limits, block_bias=False, dropout=False),
}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Calls with backend="auto" inside the block take this backend, or raise where it cannot serve them."""
    _check_name(name)
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def set_backend(name: str) -> None:
    """From now on calls with backend="auto" outside `use_backend` take this one, in all threads of the process.

    With flex, rows of single queries (decoding) stay on automatic: they are no tiles. With per_query, all others do.
    With triton, key blocks that are no multiple of 16 (single keys) do.
    Raises ValueError for an unknown name, and for flex and triton where no CUDA device could train with them.
    """
    global _backend_of_process
    _check_name(name)
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(_refused("triton", "runs on CUDA, and no GPU is here", on_cpu=True))
    if name == "flex" and not torch.cuda.is_available():
        raise ValueError(_refused("flex", "has no backward on CPU", on_cpu=True))
    _backend_of_process = name


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
) -> Tensor:
    """Softmax attention over the pairs a layout allows; exact, one softmax per row.

    q           [B, H, Nq, D]
    k, v        [B, Hkv, Nkv, D]; H a multiple of Hkv (grouped queries)
    layout      BlockLayout: which key blocks each query block reads
    scale       multiplies q·k; default 1/√D
    block_bias  [B|1, H|Hkv|1, NQ, K]: added to the scores of that entry of the layout's table, differentiable
    dropout     Dropout(rate, keys) on the attention weights
    backend     auto | native | blocked | per_query | reference | flex | triton | sdpa; auto is sdpa for dense layouts,
                else flex on CUDA and native on CPU where they can, else per_query for rows of single queries, else
                blocked

    Returns out [B, H, Nq, D] in q's dtype; a row with nothing to read is 0.
    Raises ValueError for shapes, dtypes or devices that do not fit, and for what the backend cannot do.
    """
    chosen = _chosen(q, k, v, layout, block_bias, dropout, backend, lse=False)
    arguments = (q, k, v, layout, _default(scale, q), block_bias, dropout)
    if chosen.alone is not None:
        return chosen.alone(*arguments)
    assert chosen.with_lse is not None  # a backend has one of the two
    return chosen.with_lse(*arguments)[0]


def block_sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    block_bias: Tensor | None = None,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As block_sparse_attention, and the log-sum-exp of each row's scores: [B, H, Nq] in fp32 (fp64 for fp64).

    It is differentiable, and −inf for a row with nothing to read. auto is never sdpa, which has none.
    """
    chosen = _chosen(q, k, v, layout, block_bias, dropout, backend, lse=True)
    assert chosen.with_lse is not None  # refused otherwise
    return chosen.with_lse(q, k, v, layout, _default(scale, q), block_bias, dropout)


def _default(scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    bias: Tensor | None,
    dropout: Dropout | None,
    backend: str,
    lse: bool,
) -> Backend:
    """The backend that serves a call. Raises ValueError for what does not fit or cannot be done."""
    check_arguments(q, k, v, layout, bias, dropout)
    _check_name(backend)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    ask = Request(layout, bias is not None, dropout is not None, lse, q, k.shape[1], gradients)
    name = (_preferred.get() or _process_choice(layout)) if backend == "auto" else backend
    if name == "auto":
        name = _automatic(ask)
    elif (reason := BACKENDS[name].refusal(ask)) is not None:
        raise ValueError(_refused(name, reason, on_cpu=q.device.type == "cpu"))
    explicit = layout.mask.dense
    if name == "blocked" and explicit is not None and explicit.requires_grad and torch.is_grad_enabled():
        raise ValueError('backend "blocked" gives mask.dense no gradient; detach it or use backend=reference')
    _log_once(name, ask)
    return BACKENDS[name]


def _process_choice(layout: BlockLayout) -> str:
    fits = {
        "flex": layout.q_block > 1,
        "per_query": layout.q_block == 1,
        "triton": layout.kv_block % 16 == 0,
    }
    return _backend_of_process if fits.get(_backend_of_process, True) else "auto"


def _automatic(ask: Request) -> str:
    """The first backend in the order of speed that can serve the call."""
    names = ("sdpa", "flex", "per_query") if ask.q.device.type == "cuda" else ("sdpa", "native", "per_query")
    return next((name for name in names if BACKENDS[name].refusal(ask) is None), "blocked")


def _refused(name: str, reason: str, on_cpu: bool) -> str:
    way_out = "backend=blocked"
    if name == "flex" and on_cpu:
        way_out += " or auto, or move the tensors to CUDA"
    return f'backend "{name}" {reason}; use {way_out}'


def _log_once(name: str, ask: Request) -> None:
    """Log the choice once per backend and device, and on CUDA why it is not flex."""
    on = ask.q.device.type
    if (name, on) in _logged:
        return
    _logged.add((name, on))
    why = BACKENDS["flex"].refusal(ask) if on == "cuda" and name == "blocked" else None
    log.info("attention backend on %s: %s%s", on, name, f" (flex {why})" if why else "")


def _check_name(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; choose auto, {', '.join(BACKENDS)}")
