"""What all kernels here share: the scores of a tile of queries and keys under mask and bias, dropout, exact weights.

Names of dimensions: M rows (queries of the heads that share a list), N keys, D head dim; those in tables.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightsparse.utils.hashing import M1, M2, signed

LOG2E = tl.constexpr(1.4426950408889634)
_M1, _M2 = tl.constexpr(signed(M1)), tl.constexpr(signed(M2))

# A table's entry, or a column's: a number in the upper bits, and two bits.
PARTIAL = tl.constexpr(1)  # some pair of the tile may not be read: it needs the mask
LISTED = tl.constexpr(2)  # it stands in the layout's table: where there is a block bias, it has one
BITS = tl.constexpr(2)


@triton.jit
def row_of(m, row, Q: tl.constexpr, G: tl.constexpr):
    """Query block `row`, place m of it → query, and which of the G heads."""
    return row * Q + m // G, m % G


@triton.jit
def load_rows(x, at_M, valid_M, d_D, D: tl.constexpr):
    """Vectors [M, BLOCK_D] at rows `at` of x [*, D]; zeros where not valid."""
    return tl.load(x + at_M[:, None].to(tl.int64) * D + d_D[None, :], valid_M[:, None] & (d_D < D)[None, :], 0.0)


@triton.jit
def masked_scores(
    q_MD, k_ND, scale, position_M, document_M, opens_N, closes_N, kv_document_N, key_N, partial, num_keys,
    ACC: tl.constexpr, PRECISION: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """q·k · scale; −inf where a query may not read, if the tile is partial."""
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION, out_dtype=ACC) * scale
    if partial:
        position_M1 = position_M[:, None]
        allowed_MN = (opens_N[None, :] <= position_M1) & (position_M1 < closes_N[None, :])
        allowed_MN &= (key_N < num_keys)[None, :]
        if DOCUMENTS:
            allowed_MN &= document_M[:, None] == kv_document_N[None, :]
        scores_MN = tl.where(allowed_MN, scores_MN, float("-inf"))
    return scores_MN


@triton.jit
def weights_under(scores_MN, lse_M, ACC: tl.constexpr):
    """exp(score − lse), the lse [M] in fp64; 0 in a row that reads nothing.

    The lse of n equal large scores s is s + log n, which fp32 rounds to s: its rest counts, too.
    """
    reads_M = lse_M != float("-inf")
    lse_M = tl.where(reads_M, lse_M, 0.0)
    most_M = lse_M.to(ACC)
    rest_M = (lse_M - most_M.to(tl.float64)).to(ACC)
    return tl.where(reads_M[:, None], tl.exp2((scores_MN - most_M[:, None] - rest_M[:, None]) * LOG2E), 0.0)


@triton.jit
def _mix(x):
    """utils/hashing.mix, on int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _M1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _M2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def dropout_factor(row_hash_M, key_hash_N, drop_below, factor, ACC: tl.constexpr):
    """kernels/dropout.kept: the factor where a weight stays, 0 where it is dropped."""
    bits_MN = (_mix(row_hash_M[:, None] ^ key_hash_N[None, :]) >> 20) & 0x7FFFFFFF
    return (bits_MN >= drop_below).to(ACC) * factor
