// Scores of a tile: products with the keys, bias, mask, and the panels left out because no row sees them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "query_rows.h"

namespace {

// Scores of rows m0 … m0 + rows − 1 against what they see of a chunk, −inf where they may not read. False: nothing.
inline bool QueryRows::scores(const KeyChunks &chunk, int64_t m0, int rows) {
  const Args &a = call.a;
  const int groups = (rows + GROUP - 1) / GROUP;
  const RowRange *of_group = s.range + m0 / GROUP;
  RowRange all_rows;
  for (int g = 0; g < groups; g++) all_rows.add(of_group[g]);
  const bool docs = a.q_doc && a.kv_doc;
  bool any_masked = false;
  visible_segments = width = 0;
  for (int i = 0; i < chunk.segments; i++) {
    const Segment &x = chunk.segment[i];
    if (all_rows.misses(x.range, docs)) continue;
    const bool masked = !all_rows.sees_all(x.range, docs);
    visible[visible_segments++] = Visible{&x, width, masked};
    any_masked |= masked;
    width += x.padded;
  }
  std::fill(begin, begin + groups, 0);
  std::fill(end, end + groups, width);
  if (any_masked && !call.gather) skip_hidden_panels(of_group, groups, docs);
  const float *q = s.q + m0 * call.Dp;
  for (int i = 0; i < visible_segments; i++) {
    const Segment &x = *visible[i].of;
    const int column = visible[i].column;
    float *to = s.s + column;
    const Segment &first_one = *visible[0].of;
    const void *next = i + 1 < visible_segments ? visible[i + 1].of->kt : call.backward ? first_one.vt : first_one.vn;
    if (!next) next = first_one.vh;
    by_rows(rows, column, x.padded, [&](int r, int count, int c, int n) {
      product<false>(count, n / 16, a.D, q + r * call.Dp, call.Dp, x.kt + c * call.Dp, 16, 16 * call.Dp,
                     to + r * TILE_STRIDE + c, TILE_STRIDE, false, next);
    });
    if (a.bias) add_bias(chunk, x, m0, rows, to);
    if (visible[i].masked)
      by_rows(rows, column, x.n, [&](int r, int count, int c, int n) {
        mask(x, m0 + r, count, to + r * TILE_STRIDE, c, c + n, docs);
      });
    if (x.n < x.padded)
      for (int r = 0; r < rows; r++) std::fill(to + r * TILE_STRIDE + x.n, to + r * TILE_STRIDE + x.padded, -INF);
  }
  return visible_segments > 0;
}

// Leaves out the panels before the first and after the last one that any row of a group may see.
inline void QueryRows::skip_hidden_panels(const RowRange *of_group, int groups, bool docs) {
  const KeyRange *ranges = call.ranges_of_sample(b);
  for (int g = 0; g < groups; g++) {
    begin[g] = width, end[g] = 0;
    for (int i = 0; i < visible_segments; i++)
      for (int p = 0; p < visible[i].of->padded / 16; p++)
        if (!visible[i].masked || !of_group[g].misses(ranges[visible[i].of->panel + p], docs))
          widen(g, visible[i].column + p * 16);
  }
  for (bool again = true; again;) {  // until the groups that compute a panel follow one another
    again = false;
    for (int c = 0; c < width; c += 16) {
      const auto [from, to] = groups_at(groups, c);
      for (int g = from; g < to; g++)
        if (c < begin[g] || c >= end[g]) widen(g, c), again = true;
    }
  }
}

inline void QueryRows::mask(const Segment &x, int64_t m0, int rows, float *to, int first_column, int stop,
                            bool docs) const {
  const int32_t *from = x.from, *until = x.until, *doc = x.doc;
  for (int r = 0; r < rows; r++, to += TILE_STRIDE) {
    const int32_t pos = s.pos[m0 + r], of = s.doc[m0 + r];
    for (int c = first_column; c < stop; c++) to[c] = ((from[c] <= pos) & (pos < until[c])) ? to[c] : -INF;
    if (docs)
      for (int c = first_column; c < stop; c++) to[c] = doc[c] == of ? to[c] : -INF;
  }
}

inline void QueryRows::add_bias(const KeyChunks &chunk, const Segment &x, int64_t m0, int rows, float *to) const {
  const Args &a = call.a;
  for (int r = 0; r < rows; r++, to += TILE_STRIDE) {
    const float *bias = a.bias + b * a.bias_b + head(m0 + r) / a.bias_group * a.bias_h;
    if (picks) {  // all keys here are of the block that this row picked
      const float add = bias[query(m0 + r) * a.K + picks[m0 + r].entry];
      for (int c = 0; c < x.n; c++) to[c] += add;
      continue;
    }
    bias += row * a.K;
    for (int k = x.first_span; k < x.first_span + x.spans; k++) {
      const Span &of = chunk.span[k];
      if (of.entry < 0) continue;
      const float add = bias[of.entry];
      for (int c = of.column; c < of.column + of.count; c++) to[c] += add;
    }
  }
}

// The dropout factors of a row, in the columns of its scores.
inline void QueryRows::keep_row(int64_t m, float *to) const {
  for (int i = 0; i < visible_segments; i++) {
    const Segment &x = *visible[i].of;
    keep_factors(s.hash[m], x.hashes, x.n, x.padded, (uint64_t)call.a.drop_below, (float)call.a.keep,
                 to + visible[i].column);
  }
}

}  // namespace
