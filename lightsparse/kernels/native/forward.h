// The forward of some query rows: online softmax, a chunk of keys at a time, and the products of weights and values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "scores.h"

namespace {

inline void QueryRows::forward(KeyChunks &chunks) {
  const int64_t Dp = call.Dp;
  std::fill(s.m, s.m + M, -INF);
  std::fill(s.l, s.l + M * W, 0.f);
  std::memset(s.sums, 0, M * Dp * 4);
  attend(chunks);
  for (int64_t m = 0; m < M; m++) call.write_out(unit, index(m), s.m[m], sum_of(load(s.l + m * W)), s.sums + m * Dp);
}

// Adds what the rows read of these keys to s.m, s.l and s.sums.
inline void QueryRows::attend(KeyChunks &chunks) {
  const int64_t Dp = call.Dp;
  while (chunks.next())
    for (int64_t m0 = 0; m0 < M; m0 += TILE_ROWS) {
      const int rows = (int)std::min((int64_t)TILE_ROWS, M - m0);
      if (!scores(chunks, m0, rows)) continue;
      for (int r = 0; r < rows; r++) {
        const int from = begin[r / GROUP], to = end[r / GROUP];
        if (from < to) online_softmax(m0 + r, s.s + r * TILE_STRIDE + from, from, to - from);
      }
      runs([&](int column, const Segment &x, int n) {
        const void *next = x.kt + n * Dp;
        const float *values = half ? nullptr : rows_of(x, n, false);
        by_rows(rows, column, n, [&](int r, int count, int c, int keys) {
          const float *p = s.s + r * TILE_STRIDE + column + c;
          float *to = s.sums + (m0 + r) * Dp;
#if defined(__AVX512FP16__)
          if (half) {
            const float factor = unscaled(weight_scale, call.unit_scale[unit]);
            return half_product<false>(count, Dp, keys, p, x.vh + c * Dp, factor, to, next);
          }
#endif
          product<false>(count, (int)(Dp / 16), keys, p, TILE_STRIDE, values + c * call.vn_stride, call.vn_stride, 16,
                         to, Dp, true, next);
        });
      });
    }
}

// p: scores of row m from a column on → weights relative to exp(s.m). Where the row's maximum grows by little, s.m
// stays: weights up to exp(MAX_SLACK) are as exact as those up to 1, and what has been summed needs no new scale.
inline void QueryRows::online_softmax(int64_t m, float *p, int first_column, int columns) {
  vf most = load(p);
  for (int c = W; c < columns; c += W) most = larger(most, load(p + c));
  float now = s.m[m];
  if (now == -INF || any_above(most, now + MAX_SLACK)) {
    const float before = now;
    now = std::max(before, largest_of(most));
    if (now == -INF) {  // nothing read yet: exp(−inf − −inf) is NaN
      if (std::none_of(p, p + columns, [](float x) { return x != x; })) {
        std::fill(p, p + columns, 0.f);
        return;
      }
      now = 0.f;  // NaN scores stay NaN: an error upstream must show
    }
    if (now != before) {
      const float factor = exp_of(broadcast(before - now))[0];
      float *sums = s.sums + m * call.Dp;
      for (int64_t d = 0; d < call.Dp; d += W) store(sums + d, load(sums + d) * factor);
      store(s.l + m * W, load(s.l + m * W) * factor);
      s.m[m] = now;
    }
  }
  if (call.a.drop_keys) keep_row(m, s.keep);
  with_constants([&](auto halves, auto drop) {
    vf sum = load(s.l + m * W);
    const float rest = halves ? -weight_log : 0.f, *keep = s.keep + first_column;
    for (int c = 0, n = columns; c < n; c += W) {
      vf x = exp_of_difference<halves>(load(p + c), now, rest);
      sum += x;
      if constexpr (drop) x *= load(keep + c);
      put<halves>(p + c, x);
    }
    store(s.l + m * W, sum);
  });
}

}  // namespace
