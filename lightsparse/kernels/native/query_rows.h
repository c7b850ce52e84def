// Some query rows that read the same keys, and the tiles of scores they compute.
//
// Either rows of one row of a table, for the G query heads that share it: row m = g · R + i is query first + i. Or rows
// of a portion that begins with query `first`, as their picks say.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "half_products.h"
#include "key_chunks.h"
#include "products.h"

namespace {

struct Visible {  // a segment of which the rows of a tile may see a part
  const Segment *of;
  int column;
  bool masked;  // not all rows see all of it
};

struct Fp16Scales {  // of what is multiplied in fp16 in the backward: queries, output gradients, score gradients
  float q = 1.f, dout = 1.f, ds = 1.f;
};

struct QueryRows {
  Call &call;
  Scratch &s;
  int64_t unit, table, row, first, R, M, b;
  bool half;  // products with weights and their gradients are fp16
  float weight_scale = 1.f, weight_log = 0.f;
  const Pick *picks = nullptr;
  // Of the present tile. Scores outside of a group's columns hold anything.
  Visible visible[CHUNK / 16];
  int visible_segments = 0, width = 0;
  int begin[TILE_ROWS / GROUP], end[TILE_ROWS / GROUP];  // the columns that each group of rows computes

  QueryRows(Call &call_, Scratch &s_, int64_t unit_, int64_t table_, int64_t row_, int64_t first_, int64_t R_)
      : call(call_), s(s_), unit(unit_), table(table_), row(row_), first(first_), R(R_), M(call_.G * R_),
        b(unit_ / call_.a.Hkv), half(call_.half_of(unit_)) {
    read_queries();
  }
  QueryRows(Call &call_, Scratch &s_, int64_t unit_, int64_t first_, const Pick *picks_, int64_t M_)
      : call(call_), s(s_), unit(unit_), table(0), row(0), first(first_), R(1), M(M_), b(unit_ / call_.a.Hkv),
        half(call_.half_of(unit_)), picks(picks_) {
    read_queries();
  }

  void read_queries() {
    const Args &a = call.a;
    std::fill(s.range, s.range + (M + GROUP - 1) / GROUP, RowRange{});
    for (int64_t m = 0; m < M; m++) {
      const int64_t i = query(m), h = head(m);
      read_row(a.bf16, a.q, b * a.sq[0] + h * a.sq[1] + i * a.sq[2], a.D, call.Dp, (float)a.scale, s.q + m * call.Dp);
      s.pos[m] = a.q_pos[b * a.q_pos_b + i];
      s.doc[m] = a.q_doc ? a.q_doc[b * a.q_doc_b + i] : 0;
      s.range[m / GROUP].add(RowRange{s.pos[m], s.pos[m], s.doc[m], s.doc[m]});
      if (a.drop_keys)
        s.hash[m] = chained(chained((uint64_t)a.drop_keys[b], (uint64_t)h), (uint64_t)(int64_t)s.pos[m]);
    }
    use_half(half);
  }
  void use_half(bool use) {
    half = use, weight_scale = use ? call.weight_scale : 1.f, weight_log = use ? call.weight_log : 0.f;
  }
  int64_t head(int64_t m) const {
    return picks ? call.first_head(unit, 0) + picks[m].row % call.heads() : call.first_head(unit, table) + m / R;
  }
  int64_t query(int64_t m) const { return first + (picks ? picks[m].row / call.heads() : m % R); }
  int64_t index(int64_t m) const { return (b * call.a.H + head(m)) * call.a.Nq + query(m); }  // into [B, H, Nq]

  // scores.h
  bool scores(const KeyChunks &chunk, int64_t m0, int rows);
  void skip_hidden_panels(const RowRange *of_group, int groups, bool docs);
  void mask(const Segment &x, int64_t m0, int rows, float *to, int first_column, int stop, bool docs) const;
  void add_bias(const KeyChunks &chunk, const Segment &x, int64_t m0, int rows, float *to) const;
  void keep_row(int64_t m, float *to) const;

  // forward.h
  void forward(KeyChunks &chunks);
  void attend(KeyChunks &chunks);
  void online_softmax(int64_t m, float *p, int first_column, int columns);

  // backward.h
  void backward(KeyChunks &chunks);
  void add_gradients(KeyChunks &chunks);
  Fp16Scales convert_rows();
  void add_products(int64_t m0, int rows, const Fp16Scales &scales);
  Magnitudes largest_gradients(int64_t m0, int rows) const;
  void softmax_gradients(int64_t m0, int rows, float ds_scale, bool plain);
  void add_bias_gradient(const KeyChunks &chunk, int64_t m0, int rows) const;

  void widen(int g, int column) { begin[g] = std::min(begin[g], column), end[g] = std::max(end[g], column + 16); }

  // The groups from the first to the last that compute a column; none: equal numbers.
  std::pair<int, int> groups_at(int groups, int column) const {
    int from = 0, to = groups;
    while (from < to && (column < begin[from] || column >= end[from])) from++;
    while (to > from && (column < begin[to - 1] || column >= end[to - 1])) to--;
    return {from, to};
  }

  // What a tile computes of n columns, as rectangles: use(first row, rows, first column of these, columns).
  template <class Use>
  void by_rows(int rows, int column, int n, Use use) const {
    auto clipped = [&](int g) {
      return std::make_pair(std::max(begin[g], column) - column, std::min(end[g], column + n) - column);
    };
    for (int r = 0, stop; r < rows; r = stop) {
      const auto [from, to] = clipped(r / GROUP);
      for (stop = r + GROUP; stop < rows && clipped(stop / GROUP) == std::make_pair(from, to);) stop += GROUP;
      stop = std::min(stop, rows);
      if (from < to) use(r, stop - r, from, to - from);
    }
  }

  // The same, for sums over rows: no column is in two rectangles.
  template <class Use>
  void by_columns(int rows, int column, int n, Use use) const {
    const int groups = (rows + GROUP - 1) / GROUP;
    for (int c = 0, stop; c < n; c = stop) {
      const auto [from, to] = groups_at(groups, column + c);
      for (stop = c + 16; stop < n && groups_at(groups, column + stop) == std::make_pair(from, to);) stop += 16;
      stop = std::min(stop, n);
      const int r = from * GROUP;
      if (from < to) use(r, std::min(to * GROUP, rows) - r, c, stop - c);
    }
  }

  // Visible segments whose keys follow one another in memory, as one: use(column, first segment, keys).
  template <class Use>
  void runs(Use use) const {
    for (int i = 0; i < visible_segments;) {
      const Segment &x = *visible[i].of;
      int n = x.n, stop = i + 1;
      while (stop < visible_segments && x.key >= 0 && visible[stop - 1].of->n == visible[stop - 1].of->padded &&
             visible[stop].of->key == x.key + n)
        n += visible[stop++].of->n;
      use(visible[i].column, x, n);
      i = stop;
    }
  }

  // Rows of n keys, or of their values, in fp32.
  const float *rows_of(const Segment &x, int n, bool keys) const {
    const Args &a = call.a;
    if (!call.half) return keys ? x.kn : x.vn;
    for (int c = 0; c < n; c++)
      read_row(true, keys ? a.k : a.v, keys ? call.offset_k(unit, x.key + c) : call.offset_v(unit, x.key + c), a.D,
               call.Dp, 1.f, s.rows + c * call.Dp);
    return s.rows;
  }

  // use(whether weights are fp16, whether there is dropout), both known to the compiler
  template <class Use>
  void with_constants(Use use) const {
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (half)
      call.a.drop_keys ? use(yes, yes) : use(yes, no);
    else
      call.a.drop_keys ? use(no, yes) : use(no, no);
  }

  // Weights or gradients of scores as the products want them: fp32, or pairs of the same fp16 number.
  template <bool HALF>
  static void put(float *to, vf x) {
#if defined(__AVX512FP16__)
    if constexpr (HALF) return store_twice(to, x);
#endif
    store(to, x);
  }
};

}  // namespace
