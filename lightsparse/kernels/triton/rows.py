"""By row: a program takes some queries of a row of the table through the key blocks of its list, in order.

One softmax over all of them, its sums rescaled as larger scores come (FlashAttention-2, Dao 2023, arXiv 2307.08691,
algorithm 1). A program's queries are those of the heads that share the list, so that small blocks fill a tile.
Names of dimensions: tables.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightsparse.kernels.triton.scores import (
    BITS,
    LISTED,
    LOG2E,
    PARTIAL,
    dropout_factor,
    load_rows,
    masked_scores,
    row_of,
    weights_under,
)


@triton.jit
def rows_forward(
    q, k, v, out, lse, entries, row_start, row_count, q_pos, opens, closes, q_doc, kv_doc, bias, row_hash, key_hash,
    scale, drop_below, factor, num_queries, num_keys, NQ, chunks, table_width, pos_of_b, keys_of_b, q_doc_of_b,
    kv_doc_of_b, tables_of_b, tables_of_u, bias_of_b, bias_of_h, bias_of_row, bias_heads,
    U: tl.constexpr, RATIO: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    DOCUMENTS: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, D] and lse fp64 [B, H, N]. Program: (list × chunk of its M rows)."""
    chunk, number = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    row, u, b = NQ - 1 - number % NQ, number // NQ % U, number // NQ // U  # the long lists of causal attention first
    table = b * tables_of_b + u * tables_of_u
    m_M = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    query_M, g_M = row_of(m_M, row, Q, G)
    valid_M = (m_M < Q * G) & (query_M < num_queries)
    head_M = u * G + g_M
    at_M = (b * U * G + head_M) * num_queries + query_M
    d_D = tl.arange(0, BLOCK_D)
    q_MD = load_rows(q, at_M, valid_M, d_D, D)
    position_M = tl.load(q_pos + b * pos_of_b + query_M, valid_M, 0)
    document_M = position_M
    if DOCUMENTS:
        document_M = tl.load(q_doc + b * q_doc_of_b + query_M, valid_M, -1)
    row_hash_M = position_M
    if DROPOUT:
        row_hash_M = tl.load(row_hash + at_M, valid_M, 0)
    bias_M = bias
    if BIAS:
        bias_M = bias + b * bias_of_b + head_M // bias_heads * bias_of_h + row * bias_of_row

    of_head = (b * (U // RATIO) + u // RATIO) * num_keys
    start = table.to(tl.int64) * table_width + tl.load(row_start + row)
    count = tl.load(row_count + table * NQ + row)
    most_M = tl.full([BLOCK_M], float("-inf"), ACC)
    total_M = tl.zeros([BLOCK_M], ACC)
    sum_MD = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for step in range(0, count * (S // BLOCK_N)):
        entry = tl.load(entries + start + step // (S // BLOCK_N))
        key_N = (entry >> BITS) * S + step % (S // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_N = key_N < num_keys
        k_ND = load_rows(k, of_head + key_N, inside_N, d_D, D)
        v_ND = load_rows(v, of_head + key_N, inside_N, d_D, D)
        opens_N = tl.load(opens + b * keys_of_b + key_N, inside_N, 0)
        closes_N = tl.load(closes + b * keys_of_b + key_N, inside_N, 0)
        kv_document_N = opens_N
        if DOCUMENTS:
            kv_document_N = tl.load(kv_doc + b * kv_doc_of_b + key_N, inside_N, -1)
        scores_MN = masked_scores(
            q_MD, k_ND, scale, position_M, document_M, opens_N, closes_N, kv_document_N, key_N, entry & PARTIAL,
            num_keys, ACC, PRECISION, DOCUMENTS,
        )  # fmt: skip
        if BIAS:
            listed_M = valid_M & ((entry & LISTED) != 0)
            scores_MN += tl.load(bias_M + step // (S // BLOCK_N), listed_M, 0.0).to(ACC)[:, None]
        higher_M = tl.maximum(most_M, tl.max(scores_MN, 1))
        shift_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)  # or a row without a visible key would be NaN
        p_MN = tl.exp2((scores_MN - shift_M[:, None]) * LOG2E)
        rescale_M = tl.exp2((most_M - shift_M) * LOG2E)
        most_M = higher_M
        total_M = total_M * rescale_M + tl.sum(p_MN, 1)
        if DROPOUT:
            key_hash_N = tl.load(key_hash + key_N, inside_N, 0)
            p_MN *= dropout_factor(row_hash_M, key_hash_N, drop_below, factor, ACC)
        sum_MD *= rescale_M[:, None]
        sum_MD += tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision=PRECISION, out_dtype=ACC)
    whole_M = tl.where(total_M == 0.0, 1.0, total_M)
    stored = valid_M[:, None] & (d_D < D)[None, :]
    tl.store(
        out + at_M[:, None].to(tl.int64) * D + d_D[None, :],
        (sum_MD / whole_M[:, None]).to(out.dtype.element_ty),
        stored,
    )
    lse_M = tl.where(total_M == 0.0, float("-inf"), most_M.to(tl.float64) + tl.log(whole_M).to(tl.float64))
    tl.store(lse + at_M, lse_M, valid_M)


@triton.jit
def rows_backward(
    q, k, v, grad_out, lse, delta, dq, dbias, entries, row_start, row_count, q_pos, opens, closes, q_doc, kv_doc, bias,
    row_hash, key_hash, scale, drop_below, factor, num_queries, num_keys, NQ, chunks, table_width, pos_of_b, keys_of_b,
    q_doc_of_b, kv_doc_of_b, tables_of_b, tables_of_u, bias_of_b, bias_of_h, bias_of_row, bias_heads, K,
    U: tl.constexpr, RATIO: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    DOCUMENTS: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dq [B, H, N, D], and the bias's gradient of each row and entry, [lists, M, K].

    delta  [B, H, N]: Σ dp · p of each row, less the gradient of its lse
    """
    chunk, number = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    row, u, b = NQ - 1 - number % NQ, number // NQ % U, number // NQ // U
    table = b * tables_of_b + u * tables_of_u
    m_M = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    query_M, g_M = row_of(m_M, row, Q, G)
    valid_M = (m_M < Q * G) & (query_M < num_queries)
    head_M = u * G + g_M
    at_M = (b * U * G + head_M) * num_queries + query_M
    d_D = tl.arange(0, BLOCK_D)
    q_MD = load_rows(q, at_M, valid_M, d_D, D)
    dout_MD = load_rows(grad_out, at_M, valid_M, d_D, D)
    lse_M = tl.load(lse + at_M, valid_M, float("-inf"))
    delta_M = tl.load(delta + at_M, valid_M, 0.0)
    position_M = tl.load(q_pos + b * pos_of_b + query_M, valid_M, 0)
    document_M = position_M
    if DOCUMENTS:
        document_M = tl.load(q_doc + b * q_doc_of_b + query_M, valid_M, -1)
    row_hash_M = position_M
    if DROPOUT:
        row_hash_M = tl.load(row_hash + at_M, valid_M, 0)
    bias_M = bias
    dbias_M = dbias
    if BIAS:
        bias_M = bias + b * bias_of_b + head_M // bias_heads * bias_of_h + row * bias_of_row
        dbias_M = dbias + (((b * U + u) * NQ + row).to(tl.int64) * Q * G + m_M) * K

    of_head = (b * (U // RATIO) + u // RATIO) * num_keys
    start = table.to(tl.int64) * table_width + tl.load(row_start + row)
    count = tl.load(row_count + table * NQ + row)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    of_entry_M = tl.zeros([BLOCK_M], ACC)
    for step in range(0, count * (S // BLOCK_N)):
        entry = tl.load(entries + start + step // (S // BLOCK_N))
        part = step % (S // BLOCK_N)
        key_N = (entry >> BITS) * S + part * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_N = key_N < num_keys
        k_ND = load_rows(k, of_head + key_N, inside_N, d_D, D)
        v_ND = load_rows(v, of_head + key_N, inside_N, d_D, D)
        opens_N = tl.load(opens + b * keys_of_b + key_N, inside_N, 0)
        closes_N = tl.load(closes + b * keys_of_b + key_N, inside_N, 0)
        kv_document_N = opens_N
        if DOCUMENTS:
            kv_document_N = tl.load(kv_doc + b * kv_doc_of_b + key_N, inside_N, -1)
        scores_MN = masked_scores(
            q_MD, k_ND, scale, position_M, document_M, opens_N, closes_N, kv_document_N, key_N, entry & PARTIAL,
            num_keys, ACC, PRECISION, DOCUMENTS,
        )  # fmt: skip
        if BIAS:
            listed_M = valid_M & ((entry & LISTED) != 0)
            scores_MN += tl.load(bias_M + step // (S // BLOCK_N), listed_M, 0.0).to(ACC)[:, None]
        p_MN = weights_under(scores_MN, lse_M, ACC)
        dp_MN = tl.dot(dout_MD, tl.trans(v_ND), input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            key_hash_N = tl.load(key_hash + key_N, inside_N, 0)
            dp_MN *= dropout_factor(row_hash_M, key_hash_N, drop_below, factor, ACC)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        if BIAS:
            of_entry_M = tl.where(part == 0, 0.0, of_entry_M) + tl.sum(ds_MN, 1)
            last = part == S // BLOCK_N - 1
            tl.store(dbias_M + step // (S // BLOCK_N), of_entry_M, listed_M & last)
        dq_MD += tl.dot(ds_MN.to(k_ND.dtype), k_ND, input_precision=PRECISION, out_dtype=ACC)
    stored = valid_M[:, None] & (d_D < D)[None, :]
    tl.store(dq + at_M[:, None].to(tl.int64) * D + d_D[None, :], (dq_MD * scale).to(dq.dtype.element_ty), stored)
