"""A layout and a dropout as the flat arguments of an operator, which takes tensors and numbers only, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightsparse.kernels.dropout import Dropout
from lightsparse.patterns.layout import BlockLayout
from lightsparse.patterns.mask import ElementMask

# The part of an operator's schema that stands for both; torch cannot infer it from `*arguments`.
SCHEMA = (
    "Tensor kv_indices, Tensor dense_rows, Tensor q_pos, Tensor visible_from, Tensor visible_until, Tensor? q_doc, "
    "Tensor? kv_doc, Tensor? dense, Tensor? dropout_keys, Tensor? dropout_key_ids, float rate, SymInt q_block, "
    "SymInt kv_block"
)
TENSORS = 10  # of what `flat` returns, the first so many; the numbers follow
NUMBERS = 3


def flat(layout: BlockLayout, dropout: Dropout | None) -> tuple[Any, ...]:
    """(kv_indices, dense_rows, q_pos, visible_from, visible_until, q_doc, kv_doc, dense, dropout keys, key ids, rate,
    q_block, kv_block)
    """
    mask = layout.mask
    return (
        layout.kv_indices,
        layout.dense_rows,
        mask.q_pos,
        mask.visible_from,
        mask.visible_until,
        mask.q_doc,
        mask.kv_doc,
        None if mask.dense is None else mask.dense.detach(),
        None if dropout is None else dropout.keys,
        None if dropout is None else dropout.key_ids,
        0.0 if dropout is None else dropout.rate,
        layout.q_block,
        layout.kv_block,
    )


def unflattened(
    kv_indices: Tensor,
    dense_rows: Tensor,
    q_pos: Tensor,
    visible_from: Tensor,
    visible_until: Tensor,
    q_doc: Tensor | None,
    kv_doc: Tensor | None,
    dense: Tensor | None,
    dropout_keys: Tensor | None,
    dropout_key_ids: Tensor | None,
    rate: float,
    q_block: int,
    kv_block: int,
) -> tuple[BlockLayout, Dropout | None]:
    """The inverse of `flat`, but for what no kernel reads (causal, num_tokens)."""
    mask = ElementMask(q_pos, visible_from, visible_until, q_doc, kv_doc, dense)
    dropout = None if dropout_keys is None else Dropout(rate, dropout_keys, dropout_key_ids)
    return BlockLayout(kv_indices, q_block, kv_block, mask, dense_rows), dropout
