// One call: how it is computed, its buffers, and where things lie in the tensors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "buffers.h"
#include "dropout.h"
#include "rows.h"
#include "threads.h"

namespace {

struct Call {
  const Args &a;
  Arena arena;
  bool backward;
  bool gather;    // nothing is packed ahead
  bool direct;    // rows of k, v, dk, dv are used as they are
  bool by_block;  // rows of single queries, walked by key block
  bool half;      // products with weights and their gradients are fp16
  int64_t Dp, padded_block, NB, G, tables, units, panels, rows_at_once, portion, mask_batch, kn_stride, vn_stride;
  int threads;
  float *kt = nullptr, *vt = nullptr, *kn = nullptr, *vn = nullptr, *dk = nullptr, *dv = nullptr, *slabs = nullptr;
  KeyRange *key_ranges = nullptr;  // [mask_batch][panels]
  uint64_t *hashes = nullptr;
  uint16_t *kh = nullptr, *vh = nullptr;
  float *unit_scale = nullptr;  // [units]; 0 where products stay fp32
  float weight_scale = 1.f, weight_log = 0.f;  // of fp16 weights, and its logarithm
  std::vector<Scratch> scratch;

  Call(const Args &args, bool backward_, void *work) : a(args), arena(work), backward(backward_) {
    choose();
    take_shared();
    scratch.resize(threads);
    for (Scratch &s : scratch) take_scratch(s);
  }

  void choose() {
    Dp = (a.D + 15) / 16 * 16;
    padded_block = (a.kv_block + 15) / 16 * 16;
    NB = (a.Nkv + a.kv_block - 1) / a.kv_block;
    const bool own_tables = a.table_heads == a.H;
    G = own_tables ? 1 : heads();
    tables = own_tables ? heads() : 1;
    units = a.B * a.Hkv;
    panels = NB * padded_block / 16;
    // Packing pays when keys are read more than once or twice; panels of tiny blocks would be mostly padding.
    gather = a.kv_block < 16 || tables * (a.NQ * a.K + a.dense_count * NB) <= 2 * NB;
    direct = !a.bf16 && Dp == a.D;
#if defined(__AVX512FP16__)
    half = a.bf16 && !gather && Dp % 32 == 0;
    // So that a sum of weights up to exp(MAX_SLACK), times numbers up to 1, stays below 65504, the largest in fp16.
    if (half) weight_scale = 128.f * (a.drop_keys ? scale_to_one((float)a.keep) : 1.f);
    weight_log = std::log(weight_scale);
#else
    half = false;
#endif
    rows_at_once = std::min(std::max(ROWS_AT_ONCE / G, (int64_t)1), a.q_block) * G;
    portion = std::min(std::max(PORTION_ROWS / heads(), (int64_t)1), a.Nq);
    by_block = a.q_block == 1 && !gather && portion * heads() * a.K >= FEW_PICKS * NB;
    if (by_block) rows_at_once = std::max(rows_at_once, (int64_t)TILE_ROWS);
    mask_batch = (a.from_b || a.until_b || a.kv_doc_b) ? a.B : 1;
    kn_stride = gather || !direct ? Dp : a.sk[2];
    vn_stride = gather || !direct ? Dp : a.sv[2];
    const double work = (double)a.B * a.H * a.Nq * std::min(a.K * a.kv_block + a.dense_count, a.Nkv) * a.D;
    threads = (int)std::max((int64_t)1, std::min(a.threads, (int64_t)(work / 4e5) + 1));
  }

  void take_shared() {
    const int64_t of_units = units * a.Nkv * Dp;
    if (!gather) {
      kt = arena.take<float>(units * panels * 16 * Dp);
      if (backward) vt = arena.take<float>(units * panels * 16 * Dp);
      if (half) {
        (backward ? kh : vh) = arena.take<uint16_t>(of_units);
        unit_scale = arena.take<float>(units);
      } else if (!direct) {
        (backward ? kn : vn) = arena.take<float>(of_units);
      }
      key_ranges = arena.take<KeyRange>(mask_batch * panels);
    }
    if (a.drop_keys) hashes = arena.take<uint64_t>(a.Nkv);
    if (backward) {
      dk = direct ? (float *)a.dk : arena.take<float>(of_units);
      dv = direct ? (float *)a.dv : arena.take<float>(of_units);
      slabs = arena.take<float>((threads - 1) * 2 * a.Nkv * Dp);
    }
  }

  void take_scratch(Scratch &s) {
    s.q = arena.take<float>(rows_at_once * Dp);
    s.dout = arena.take<float>(backward ? rows_at_once * Dp : 0);
    s.sums = arena.take<float>(backward ? 0 : rows_at_once * Dp);
    s.dq = arena.take<float>(backward ? rows_at_once * Dp : 0);
    s.m = arena.take<float>(rows_at_once), s.l = arena.take<float>(rows_at_once * W);
    s.delta = arena.take<float>(rows_at_once);
    s.pos = arena.take<int32_t>(rows_at_once), s.doc = arena.take<int32_t>(rows_at_once);
    s.range = arena.take<RowRange>((rows_at_once + GROUP - 1) / GROUP);
    s.hash = arena.take<uint64_t>(rows_at_once);
    s.s = arena.take<float>(TILE_ROWS * TILE_STRIDE), s.dp = arena.take<float>(TILE_ROWS * TILE_STRIDE);
    s.keep = arena.take<float>(CHUNK);
    const int64_t gathered = gather ? CHUNK * Dp : 0;
    s.kt = arena.take<float>(gathered), s.vt = arena.take<float>(gathered), s.kn = arena.take<float>(gathered);
    s.vn = arena.take<float>(gathered), s.dk = arena.take<float>(gathered), s.dv = arena.take<float>(gathered);
    s.from = arena.take<int32_t>(CHUNK), s.until = arena.take<int32_t>(CHUNK);
    s.kv_doc = arena.take<int32_t>(CHUNK), s.ids = arena.take<int64_t>(CHUNK);
    s.hashes = arena.take<uint64_t>(CHUNK);
    s.rows16 = arena.take<float>(16 * Dp);
    s.rows = arena.take<float>(half ? CHUNK * Dp : 0);
    const int64_t halves = half && backward ? rows_at_once * Dp : 0;
    s.q_half = arena.take<uint16_t>(halves), s.dout_half = arena.take<uint16_t>(halves);
    const int64_t rows = by_block ? portion * heads() : 0;
    s.picks = arena.take<Pick>(rows * a.K);
    s.stop = arena.take<int64_t>(by_block ? NB + 1 : 0);
    s.row_m = arena.take<float>(rows), s.row_l = arena.take<float>(rows), s.row_delta = arena.take<float>(rows);
    s.row_sums = arena.take<float>(rows * Dp), s.row_dout = arena.take<float>(backward ? rows * Dp : 0);
  }

  const int32_t *table_row(int64_t unit, int64_t table, int64_t row) const {
    const int64_t b = unit / a.Hkv, hkv = unit % a.Hkv;
    const int64_t head = a.table_heads == 1 ? 0 : a.table_heads == a.H ? hkv * tables + table : hkv;
    return a.table + (((a.table_batch == 1 ? 0 : b) * a.table_heads + head) * a.NQ + row) * a.K;
  }
  int64_t keys_of_row(const int32_t *entries, int64_t row) const {
    if (a.dense_row[row]) return a.Nkv;
    int64_t count = 0;
    for (int64_t e = 0; e < a.K; e++) count += entries[e] >= 0;
    return count * a.kv_block;
  }
  int64_t heads() const { return a.H / a.Hkv; }  // query heads of a unit
  int64_t first_head(int64_t unit, int64_t table) const { return unit % a.Hkv * heads() + table; }  // of G in order
  bool half_of(int64_t unit) const { return half && unit_scale[unit] > 0.f; }
  uint64_t hash_of_key(int64_t key) const { return key_hash((uint64_t)(a.key_ids ? a.key_ids[key] : key)); }
  int64_t offset_k(int64_t unit, int64_t key) const {
    return unit / a.Hkv * a.sk[0] + unit % a.Hkv * a.sk[1] + key * a.sk[2];
  }
  int64_t offset_v(int64_t unit, int64_t key) const {
    return unit / a.Hkv * a.sv[0] + unit % a.Hkv * a.sv[1] + key * a.sv[2];
  }
  const KeyRange *ranges_of_sample(int64_t b) const { return key_ranges + (mask_batch == 1 ? 0 : b) * panels; }

  // Of one row: the gradient of its output, its lse in two parts, and delta. Where it reads nothing, the lse is +inf:
  // P = exp(S − inf) = 0.
  void read_gradient(int64_t b, int64_t h, int64_t i, float *dout, float *out, float &lse, float &rest,
                     float &delta) const {
    const int64_t at = (b * a.H + h) * a.Nq + i;
    read_row(a.bf16, a.dout, b * a.sdo[0] + h * a.sdo[1] + i * a.sdo[2], a.D, Dp, 1.f, dout);
    read_row(a.bf16, a.out_saved, at * a.D, a.D, Dp, 1.f, out);
    vf sum = vf{};
    for (int64_t d = 0; d < Dp; d += W) sum += load(dout + d) * load(out + d);
    const bool empty = a.lse[at] == -INF;
    lse = empty ? INF : (float)a.lse[at];
    rest = empty ? 0.f : (float)(a.lse[at] - lse);
    delta = empty ? 0.f : sum_of(sum) - (a.dlse ? a.dlse[at] : 0.f);
  }

  void write_out(int64_t unit, int64_t to, float m, float l, const float *sums) const {
    const bool empty = m == -INF;
    if (half_of(unit)) l /= weight_scale;
    write_row(a.bf16, a.out, to * a.D, a.D, empty ? 0.f : 1.f / l, sums);
    a.lse[to] = empty ? -INF : m + std::log((double)l);
  }
};

}  // namespace
