"""What the programs by column leave, added up in a fixed order. Names of dimensions: tables.py."""

from __future__ import annotations

import triton
import triton.language as tl

from lightsparse.kernels.triton.scores import LOG2E, row_of


@triton.jit
def merge_outputs(
    sums, most, total, out, lse, row_count, rows, num_queries, NQ, first_table, K,
    Q: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out and lse of the portion's rows from the parts of their entries: one softmax over all of them."""
    r_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    list_R, m_R = r_R // (Q * G), (r_R % (Q * G)).to(tl.int32)
    table_R, row_R = first_table + (list_R // NQ).to(tl.int32), (list_R % NQ).to(tl.int32)
    query_R, g_R = row_of(m_R, row_R, Q, G)
    valid_R = (r_R < rows) & (query_R < num_queries)
    count_R = tl.load(row_count + list_R, valid_R, 0) * PARTS
    d_D = tl.arange(0, BLOCK_D)
    most_R = tl.full([BLOCK_R], float("-inf"), ACC)
    total_R = tl.zeros([BLOCK_R], ACC)
    sum_RD = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for step in range(0, tl.max(count_R, 0)):
        here_R = step < count_R
        at_R = (list_R * K * PARTS + step) * (Q * G) + m_R
        new_R = tl.load(most + at_R, here_R, float("-inf"))
        higher_R = tl.maximum(most_R, new_R)
        shift_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
        before_R, now_R = tl.exp2((most_R - shift_R) * LOG2E), tl.exp2((new_R - shift_R) * LOG2E)
        most_R = higher_R
        total_R = total_R * before_R + tl.load(total + at_R, here_R, 0.0) * now_R
        part_RD = tl.load(sums + at_R[:, None] * D + d_D[None, :], here_R[:, None] & (d_D < D)[None, :], 0.0)
        sum_RD = sum_RD * before_R[:, None] + part_RD * now_R[:, None]
    whole_R = tl.where(total_R == 0.0, 1.0, total_R)
    to_R = (table_R.to(tl.int64) * G + g_R) * num_queries + query_R
    stored = valid_R[:, None] & (d_D < D)[None, :]
    tl.store(out + to_R[:, None] * D + d_D[None, :], (sum_RD / whole_R[:, None]).to(out.dtype.element_ty), stored)
    lse_R = tl.where(total_R == 0.0, float("-inf"), most_R.to(tl.float64) + tl.log(whole_R).to(tl.float64))
    tl.store(lse + to_R, lse_R, valid_R)


@triton.jit
def merge_query_gradients(
    parts, dq, row_count, scale, rows, num_queries, NQ, first_table, K,
    Q: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of the portion's rows: the sum of the parts of their entries, scaled."""
    r_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    list_R, m_R = r_R // (Q * G), (r_R % (Q * G)).to(tl.int32)
    table_R, row_R = first_table + (list_R // NQ).to(tl.int32), (list_R % NQ).to(tl.int32)
    query_R, g_R = row_of(m_R, row_R, Q, G)
    valid_R = (r_R < rows) & (query_R < num_queries)
    count_R = tl.load(row_count + list_R, valid_R, 0) * PARTS
    d_D = tl.arange(0, BLOCK_D)
    sum_RD = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    for step in range(0, tl.max(count_R, 0)):
        at_R = (list_R * K * PARTS + step) * (Q * G) + m_R
        here = (step < count_R)[:, None] & (d_D < D)[None, :]
        sum_RD += tl.load(parts + at_R[:, None] * D + d_D[None, :], here, 0.0)
    to_R = (table_R.to(tl.int64) * G + g_R) * num_queries + query_R
    stored = valid_R[:, None] & (d_D < D)[None, :]
    tl.store(dq + to_R[:, None] * D + d_D[None, :], (sum_RD * scale).to(dq.dtype.element_ty), stored)


@triton.jit
def add_segments(
    dk_parts, dv_parts, dk, dv, first_segment, scale, num_keys, J, first_head, first_table, tables_of_b, tables_of_u,
    repeats, repeats_of_b, repeats_of_u,
    HKV: tl.constexpr, RATIO: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, Hkv, Nkv, D]: of each key block the sum over the list heads that share it and over its segments."""
    head, j = first_head + tl.program_id(0) // J, tl.program_id(0) % J
    b, kv_head = head // HKV, head % HKV
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d_D = tl.arange(0, BLOCK_D)
    here = (n_N < S)[:, None] & (d_D < D)[None, :]
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for shared in range(0, RATIO):
        u = kv_head * RATIO + shared
        block = (b * tables_of_b + u * tables_of_u - first_table) * J + j
        repeat = b * repeats_of_b + u * repeats_of_u
        first = tl.load(first_segment + block).to(tl.int64)
        for step in range(0, tl.load(first_segment + block + 1).to(tl.int32) - first.to(tl.int32)):
            at_N = ((first + step) * repeats + repeat) * S + n_N
            dk_ND += tl.load(dk_parts + at_N[:, None] * D + d_D[None, :], here, 0.0)
            dv_ND += tl.load(dv_parts + at_N[:, None] * D + d_D[None, :], here, 0.0)
    key_N = j * S + n_N
    to_N = head.to(tl.int64) * num_keys + key_N
    stored = here & (key_N < num_keys)[:, None]
    tl.store(dk + to_N[:, None] * D + d_D[None, :], (dk_ND * scale).to(dk.dtype.element_ty), stored)
    tl.store(dv + to_N[:, None] * D + d_D[None, :], dv_ND.to(dv.dtype.element_ty), stored)
