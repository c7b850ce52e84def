// What Python passes for one call: sizes, addresses and strides.
#pragma once

#include <cstdint>

extern "C" struct Args {  // the fields of build.Arguments in the same order, each 8 bytes wide
  int64_t B, H, Hkv, Nq, Nkv, D, table_batch, table_heads, NQ, K, q_block, kv_block, dense_count, bf16, threads;
  double scale;
  const void *q, *k, *v, *out_saved, *dout;  // strides below; the last dimension is contiguous
  int64_t sq[3], sk[3], sv[3], sdo[3];       // elements per sample, head, token
  void *out, *dq, *dk, *dv;                  // contiguous, as is out_saved
  double *lse;                               // [B, H, Nq]
  const float *dlse;                         // [B, H, Nq] or null
  const int32_t *table;                      // [table_batch, table_heads, NQ, K]: key blocks, -1 padded
  const uint8_t *dense_row;                  // [NQ]: whether these queries read every key
  const int32_t *q_pos, *from, *until, *q_doc, *kv_doc;
  int64_t q_pos_b, from_b, until_b, q_doc_b, kv_doc_b;  // elements per sample, 0 where all samples share
  const float *bias;                                    // [B or 1, bias heads, NQ, K] or null
  int64_t bias_b, bias_h, bias_group;                   // elements per sample and bias head; query heads per bias head
  float *dbias;                                         // [B, H, NQ, K], zeros at first
  const int64_t *drop_keys, *key_ids;                   // [B], [Nkv]; or null
  int64_t drop_below;                                   // of 2^31: a weight whose hash is below is dropped
  double keep;                                          // 1 / (1 − rate)
  void *work;                                           // `native_workspace` bytes
};
