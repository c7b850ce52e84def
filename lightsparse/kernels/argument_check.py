"""Whether the arguments of a call fit together, before a backend is chosen."""

from __future__ import annotations

from torch import Tensor

from lightsparse.kernels.dropout import Dropout
from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.mask import ElementMask


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, bias: Tensor | None, dropout: Dropout | None
) -> None:
    """Raises ValueError for shapes, dtypes and devices that do not fit; see block_sparse_attention."""
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
        values = getattr(mask, name)
        # Here and above not `in (1, batch)`: torch.compile takes that for false where the batch is a symbol.
        if values is not None and values.shape[0] != 1 and values.shape[0] != q.shape[0]:
            raise ValueError(
                f"mask.{name} is for batch {values.shape[0]}; q has batch {q.shape[0]}, of which it takes 1 or all"
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
