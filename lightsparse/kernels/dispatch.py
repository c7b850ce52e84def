"""One entry to all backends: each declares what it can do, the dispatcher refuses the rest and names the way out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.kernels import blocked_op, flex, reference, routed_op, sdpa
from lightsparse.kernels.dropout import Dropout
from lightsparse.kernels.native import call as native_call
from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.mask import ElementMask

log = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()
_of_process = "auto"  # no ContextVar: recomputation in the backward may run in a thread of autograd's own
_preferred: ContextVar[str | None] = ContextVar("lightsparse_backend", default=None)


@dataclass(frozen=True)
class Request:
    """What one call asks of a backend."""

    layout: BlockLayout
    bias: bool
    dropout: bool
    lse: bool
    nq: int
    nkv: int
    q: Tensor  # for its device, dtype and shape
    gradients: bool


@dataclass(frozen=True)
class Backend:
    """Capabilities, checked before any compute."""

    name: str
    block_bias: bool = True
    dropout: bool = True
    differentiable_lse: bool = True
    any_layout: bool = True  # otherwise only layouts that are dense
    explicit_mask: bool = True  # layout.mask.dense
    flex: bool = False  # FlexAttention, whose limits depend on device, dtype and size
    routed: bool = False  # only layouts whose rows are single queries
    native: bool = False  # the compiled kernel, which needs a CPU, its dtypes and a compiler

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
        if ask.layout.mask.dense is not None and not self.explicit_mask:
            return "takes no mask.dense"
        if self.routed and ask.layout.q_block != 1:
            return f"takes layouts with a row per query (q_block = 1), and this one has {ask.layout.q_block}"
        if self.native:
            return _native_refusal(ask)
        return flex.refusal(ask.q, ask.layout, gradients=ask.gradients, lse=ask.lse) if self.flex else None


def _native_refusal(ask: Request) -> str | None:
    if ask.q.device.type != "cpu":
        return f"runs on CPU only, and the tensors are on {ask.q.device.type}"
    if ask.q.dtype not in native_call.DTYPES:
        return f"takes torch.float32 and torch.bfloat16, not {ask.q.dtype}"
    return None if native_call.available() else "could not be built here (the log says why)"


BACKENDS = {
    "reference": Backend("reference"),
    "blocked": Backend("blocked"),
    "native": Backend("native", explicit_mask=False, native=True),
    "routed": Backend("routed", explicit_mask=False, routed=True),
    "flex": Backend("flex", block_bias=False, dropout=False, flex=True),
    "sdpa": Backend("sdpa", block_bias=False, dropout=False, differentiable_lse=False, any_layout=False),
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

    With flex, rows of single queries (decoding) stay on automatic: they are no tiles. With routed, all others do.
    Raises ValueError for an unknown name, and for flex where no CUDA device could train with it.
    """
    global _of_process
    _check_name(name)
    if name == "flex" and not torch.cuda.is_available():
        raise ValueError(_refused("flex", "has no backward on CPU", on_cpu=True))
    _of_process = name


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
    backend     auto | native | blocked | routed | reference | flex | sdpa; auto is sdpa for dense layouts, else flex on
                CUDA and native on CPU where they can, else routed for rows of single queries, else blocked
    return_lse  also return the log-sum-exp of each row's scores, [B, H, Nq] fp32, differentiable

    Returns out [B, H, Nq, D] in q's dtype; a row with nothing to read is 0 (lse −inf).
    Raises ValueError for shapes, dtypes or devices that do not fit, and for what the backend cannot do.
    """
    _check(q, k, v, layout, block_bias, dropout)
    _check_name(backend)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    ask = Request(layout, block_bias is not None, dropout is not None, return_lse, q.shape[2], k.shape[2], q, gradients)
    chosen = (_preferred.get() or _process_choice(layout)) if backend == "auto" else backend
    if chosen == "auto":
        chosen = _automatic(ask)
    elif (reason := BACKENDS[chosen].refusal(ask)) is not None:
        raise ValueError(_refused(chosen, reason, on_cpu=q.device.type == "cpu"))
    if (
        chosen == "blocked"
        and torch.is_grad_enabled()
        and layout.mask.dense is not None
        and layout.mask.dense.requires_grad
    ):
        raise ValueError('backend "blocked" gives mask.dense no gradient; detach it or use backend=reference')
    _say(chosen, ask)

    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if chosen == "sdpa":
        return sdpa.attention(q, k, v, layout, scale)
    out: Tensor
    lse: Tensor | None
    if chosen == "flex":
        out, lse = flex.attention(q, k, v, layout, scale, return_lse)
    elif chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):  # or the truth would round its products to bf16
            out, lse = reference.attention(q, k, v, layout, scale, block_bias, dropout)
    elif chosen == "native":
        out, lse = native_call.attention(q, k, v, layout, scale, block_bias, dropout)
    elif chosen == "routed":
        out, lse = routed_op.attention(q, k, v, layout, scale, block_bias, dropout)
    else:
        out, lse = blocked_op.attention(q, k, v, layout, scale, block_bias, dropout, return_lse)
    return (out, lse) if lse is not None and return_lse else out


def _process_choice(layout: BlockLayout) -> str:
    fits = {"flex": layout.q_block > 1, "routed": layout.q_block == 1}
    return _of_process if fits.get(_of_process, True) else "auto"


def _automatic(ask: Request) -> str:
    """The first backend in the order of speed that can serve the call."""
    names = ("sdpa", "flex", "routed") if ask.q.device.type == "cuda" else ("sdpa", "native", "routed")
    return next((name for name in names if BACKENDS[name].refusal(ask) is None), "blocked")


def _refused(chosen: str, reason: str, on_cpu: bool) -> str:
    way_out = "backend=blocked"
    if chosen == "flex" and on_cpu:
        way_out += " or auto, or move the tensors to CUDA"
    return f'backend "{chosen}" {reason}; use {way_out}'


def _say(chosen: str, ask: Request) -> None:
    """Log the choice once per backend and device, and on CUDA why it is not flex."""
    on = ask.q.device.type
    if (chosen, on) in _said:
        return
    _said.add((chosen, on))
    why = BACKENDS["flex"].refusal(ask) if on == "cuda" and chosen == "blocked" else None
    log.info("attention backend on %s: %s%s", on, chosen, f" (flex {why})" if why else "")


def _check_name(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}; choose auto, {', '.join(BACKENDS)}")


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, bias: Tensor | None, dropout: Dropout | None) -> None:
    if k.shape != v.shape or q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "they must be [B, H, Nq, D] and twice [B, Hkv, Nkv, D]"
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
            f"the layout is for {layout.num_queries} queries and {layout.num_keys} keys; "
            f"q has {q.shape[2]} and k {k.shape[2]}"
        )
    batch, of_heads = layout.kv_indices.shape[:2]
    if batch not in (1, q.shape[0]) or of_heads not in (1, kv_heads, heads):
        raise ValueError(
            f"the layout's table is for batch {batch} and {of_heads} heads; q, k have batch {q.shape[0]}, "
            f"{heads} and {kv_heads} heads, of which the table takes 1 or all"
        )
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v are on {q.device}, {k.device} and {v.device}; they must share one device")
    if layout.kv_indices.device != q.device:
        raise ValueError(
            f"the layout is on {layout.kv_indices.device} and q on {q.device}; build it with device=q.device"
        )
    if bias is not None and (
        bias.shape[2:] != layout.kv_indices.shape[2:]
        or (bias.shape[0] != 1 and bias.shape[0] != q.shape[0])
        or (bias.shape[1] != 1 and bias.shape[1] != kv_heads and bias.shape[1] != heads)
    ):
        raise ValueError(
            f"block_bias is {tuple(bias.shape)}; it must be [B|1, H|Hkv|1, NQ, K] "
            f"with NQ, K = {tuple(layout.kv_indices.shape[2:])}"
        )
    if dropout is not None and dropout.keys.shape != q.shape[:1]:
        raise ValueError(
            f"dropout.keys has shape {tuple(dropout.keys.shape)}; q has batch {q.shape[0]}, a key per sample"
        )
    _check_mask(layout.mask, q)


def _check_mask(mask: ElementMask, q: Tensor) -> None:
    for name in ("q_pos", "visible_from", "visible_until", "q_doc", "kv_doc"):
        held = getattr(mask, name)
        # Here and above not `in (1, batch)`: torch.compile takes that for false where the batch is a symbol.
        if held is not None and held.shape[0] != 1 and held.shape[0] != q.shape[0]:
            raise ValueError(
                f"mask.{name} is for batch {held.shape[0]}; q has batch {q.shape[0]}, of which it takes 1 or all"
            )
    if mask.dense is not None:
        batch, heads = mask.dense.shape[:2]
        if (
            batch not in (1, q.shape[0])
            or heads not in (1, q.shape[1])
            or mask.dense.shape[2:] != (mask.num_queries, mask.num_keys)
        ):
            raise ValueError(
                f"mask.dense is {tuple(mask.dense.shape)}; it must be [B|1, H|1, Nq, Nkv], here with B, H, Nq, Nkv = "
                f"{(*q.shape[:3], mask.num_keys)}"
            )
