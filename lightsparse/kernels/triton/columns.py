"""By column: a program takes a key block, or a part of it, through some of the rows of the table that read it.

The rows that read a block are gathered, wherever they are; a block with many is cut into segments of bounded length,
whose sums are added in order (merge.py): no atomics, the same bits every time.
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
def columns_forward(
    q, k, v, sums, most, total, segment_block, first_segment, column_start, column_row, column_entry, q_pos, opens,
    closes, q_doc, kv_doc, bias, row_hash, key_hash, scale, drop_below, factor, num_queries, num_keys, NQ, J, blocks,
    longest, first_table, pos_of_b, keys_of_b, q_doc_of_b, kv_doc_of_b, bias_of_b, bias_of_h, bias_of_row, bias_heads,
    K,
    U: tl.constexpr, RATIO: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    DOCUMENTS: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Of each entry, part of its block and row: Σ p · v [D], the largest score, Σ p. A table per sample and list head.

    sums [tables · NQ, K, S / BLOCK_N, M, D], most and total the same without D, of this portion's tables.
    """
    segment, part = tl.program_id(0), tl.program_id(1)
    block = tl.load(segment_block + segment)
    if block < blocks:
        table = block // J
        u, b = (first_table + table) % U, (first_table + table) // U
        d_D = tl.arange(0, BLOCK_D)
        key_N = block % J * S + part * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_N = key_N < num_keys
        of_head = (b * (U // RATIO) + u // RATIO) * num_keys
        k_ND = load_rows(k, of_head + key_N, inside_N, d_D, D)
        v_ND = load_rows(v, of_head + key_N, inside_N, d_D, D)
        opens_N = tl.load(opens + b * keys_of_b + key_N, inside_N, 0)
        closes_N = tl.load(closes + b * keys_of_b + key_N, inside_N, 0)
        kv_document_N = opens_N
        if DOCUMENTS:
            kv_document_N = tl.load(kv_doc + b * kv_doc_of_b + key_N, inside_N, -1)
        start = tl.load(column_start + block) + (segment - tl.load(first_segment + block)) * longest
        stop = tl.minimum(start + longest, tl.load(column_start + block + 1))
        for step in range(0, tl.cdiv((stop - start) * (Q * G), BLOCK_M)):
            place_M = step * BLOCK_M + tl.arange(0, BLOCK_M)
            in_list_M = place_M < (stop - start) * (Q * G)
            row_M = tl.load(column_row + start + place_M // (Q * G), in_list_M, 0)
            entry_M = tl.load(column_entry + start + place_M // (Q * G), in_list_M, 0)
            m_M = place_M % (Q * G)
            query_M, g_M = row_of(m_M, row_M, Q, G)
            valid_M = in_list_M & (query_M < num_queries)
            head_M = u * G + g_M
            at_M = (b * U * G + head_M) * num_queries + query_M
            q_MD = load_rows(q, at_M, valid_M, d_D, D)
            position_M = tl.load(q_pos + b * pos_of_b + query_M, valid_M, 0)
            document_M = position_M
            if DOCUMENTS:
                document_M = tl.load(q_doc + b * q_doc_of_b + query_M, valid_M, -1)
            scores_MN = masked_scores(
                q_MD, k_ND, scale, position_M, document_M, opens_N, closes_N, kv_document_N, key_N,
                tl.max(entry_M & PARTIAL, 0), num_keys, ACC, PRECISION, DOCUMENTS,
            )  # fmt: skip
            if BIAS:
                bias_M = bias + b * bias_of_b + head_M // bias_heads * bias_of_h + row_M * bias_of_row
                listed_M = valid_M & ((entry_M & LISTED) != 0)
                scores_MN += tl.load(bias_M + (entry_M >> BITS), listed_M, 0.0).to(ACC)[:, None]
            most_M = tl.max(scores_MN, 1)
            shift_M = tl.where(most_M == float("-inf"), 0.0, most_M)
            p_MN = tl.exp2((scores_MN - shift_M[:, None]) * LOG2E)
            total_M = tl.sum(p_MN, 1)
            if DROPOUT:
                row_hash_M = tl.load(row_hash + at_M, valid_M, 0)
                key_hash_N = tl.load(key_hash + key_N, inside_N, 0)
                p_MN *= dropout_factor(row_hash_M, key_hash_N, drop_below, factor, ACC)
            sum_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision=PRECISION, out_dtype=ACC)
            of_entry_M = (table * NQ + row_M).to(tl.int64) * K + (entry_M >> BITS)
            to_M = (of_entry_M * (S // BLOCK_N) + part) * (Q * G) + m_M
            tl.store(sums + to_M[:, None] * D + d_D[None, :], sum_MD, valid_M[:, None] & (d_D < D)[None, :])
            tl.store(most + to_M, most_M, valid_M)
            tl.store(total + to_M, total_M, valid_M)


@triton.jit
def columns_backward(
    q, k, v, grad_out, lse, delta, dk, dv, dq_parts, dbias_parts, segment_block, first_segment, column_start,
    column_row, column_entry, q_pos, opens, closes, q_doc, kv_doc, bias, row_hash, key_hash, scale, drop_below, factor,
    num_queries, num_keys, NQ, J, blocks, longest, first_table, table_heads, repeats, heads_repeated, pos_of_b,
    keys_of_b, q_doc_of_b, kv_doc_of_b, bias_of_b, bias_of_h, bias_of_row, bias_heads,
    K,
    U: tl.constexpr, RATIO: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    DOCUMENTS: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, WITH_DQ: tl.constexpr,
):  # fmt: skip
    """dk, dv [segments, repeats, S, D] in fp32, still to be added over segments, and dk to be scaled.

    A table is repeated for the samples and heads that share it. WITH_DQ: also each row's part of dq by this block, and
    of the bias's gradient, laid out as the sums of columns_forward.
    """
    segment, part, repeat = tl.program_id(0), tl.program_id(1) // repeats, tl.program_id(1) % repeats
    block = tl.load(segment_block + segment)
    if block < blocks:
        table = block // J
        b = (first_table + table) // table_heads + repeat // heads_repeated
        u = (first_table + table) % table_heads + repeat % heads_repeated
        d_D = tl.arange(0, BLOCK_D)
        key_N = block % J * S + part * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_N = key_N < num_keys
        of_head = (b * (U // RATIO) + u // RATIO) * num_keys
        k_ND = load_rows(k, of_head + key_N, inside_N, d_D, D)
        v_ND = load_rows(v, of_head + key_N, inside_N, d_D, D)
        opens_N = tl.load(opens + b * keys_of_b + key_N, inside_N, 0)
        closes_N = tl.load(closes + b * keys_of_b + key_N, inside_N, 0)
        kv_document_N = opens_N
        if DOCUMENTS:
            kv_document_N = tl.load(kv_doc + b * kv_doc_of_b + key_N, inside_N, -1)
        start = tl.load(column_start + block) + (segment - tl.load(first_segment + block)) * longest
        stop = tl.minimum(start + longest, tl.load(column_start + block + 1))
        dk_ND = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        dv_ND = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        for step in range(0, tl.cdiv((stop - start) * (Q * G), BLOCK_M)):
            place_M = step * BLOCK_M + tl.arange(0, BLOCK_M)
            in_list_M = place_M < (stop - start) * (Q * G)
            row_M = tl.load(column_row + start + place_M // (Q * G), in_list_M, 0)
            entry_M = tl.load(column_entry + start + place_M // (Q * G), in_list_M, 0)
            m_M = place_M % (Q * G)
            query_M, g_M = row_of(m_M, row_M, Q, G)
            valid_M = in_list_M & (query_M < num_queries)
            head_M = u * G + g_M
            at_M = (b * U * G + head_M) * num_queries + query_M
            q_MD = load_rows(q, at_M, valid_M, d_D, D)
            dout_MD = load_rows(grad_out, at_M, valid_M, d_D, D)
            lse_M = tl.load(lse + at_M, valid_M, float("-inf"))
            delta_M = tl.load(delta + at_M, valid_M, 0.0)
            position_M = tl.load(q_pos + b * pos_of_b + query_M, valid_M, 0)
            document_M = position_M
            if DOCUMENTS:
                document_M = tl.load(q_doc + b * q_doc_of_b + query_M, valid_M, -1)
            scores_MN = masked_scores(
                q_MD, k_ND, scale, position_M, document_M, opens_N, closes_N, kv_document_N, key_N,
                tl.max(entry_M & PARTIAL, 0), num_keys, ACC, PRECISION, DOCUMENTS,
            )  # fmt: skip
            if BIAS:
                bias_M = bias + b * bias_of_b + head_M // bias_heads * bias_of_h + row_M * bias_of_row
                listed_M = valid_M & ((entry_M & LISTED) != 0)
                scores_MN += tl.load(bias_M + (entry_M >> BITS), listed_M, 0.0).to(ACC)[:, None]
            p_MN = weights_under(scores_MN, lse_M, ACC)
            dp_MN = tl.dot(dout_MD, tl.trans(v_ND), input_precision=PRECISION, out_dtype=ACC)
            kept_MN = p_MN
            if DROPOUT:
                row_hash_M = tl.load(row_hash + at_M, valid_M, 0)
                key_hash_N = tl.load(key_hash + key_N, inside_N, 0)
                factor_MN = dropout_factor(row_hash_M, key_hash_N, drop_below, factor, ACC)
                dp_MN *= factor_MN
                kept_MN = p_MN * factor_MN
            dv_ND += tl.dot(tl.trans(kept_MN.to(dout_MD.dtype)), dout_MD, input_precision=PRECISION, out_dtype=ACC)
            ds_MN = p_MN * (dp_MN - delta_M[:, None])
            dk_ND += tl.dot(tl.trans(ds_MN.to(q_MD.dtype)), q_MD, input_precision=PRECISION, out_dtype=ACC)
            if WITH_DQ:
                dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, input_precision=PRECISION, out_dtype=ACC)
                of_entry_M = (table * NQ + row_M).to(tl.int64) * K + (entry_M >> BITS)
                to_M = (of_entry_M * (S // BLOCK_N) + part) * (Q * G) + m_M
                tl.store(dq_parts + to_M[:, None] * D + d_D[None, :], dq_MD, valid_M[:, None] & (d_D < D)[None, :])
                if BIAS:
                    tl.store(dbias_parts + to_M, tl.sum(ds_MN, 1), valid_M)
        n_N = part * BLOCK_N + tl.arange(0, BLOCK_N)
        to_N = (segment.to(tl.int64) * repeats + repeat) * S + n_N
        stored = (d_D < D)[None, :] & (n_N < S)[:, None]
        tl.store(dk + to_N[:, None] * D + d_D[None, :], dk_ND, stored)
        tl.store(dv + to_N[:, None] * D + d_D[None, :], dv_ND, stored)
