// The backward of some query rows: weights and their gradients again from the scores, and the products with them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scores.h"

namespace {

inline void QueryRows::backward(KeyChunks &chunks) {
  const Args &a = call.a;
  const int64_t Dp = call.Dp;
  for (int64_t m = 0; m < M; m++)  // dq is not in use yet: there is room for the output
    call.read_gradient(b, head(m), first + m % R, s.dout + m * Dp, s.dq + m * Dp, s.m[m], s.l[m], s.delta[m]);
  std::memset(s.dq, 0, M * Dp * 4);
  add_gradients(chunks);
  for (int64_t m = 0; m < M; m++) write_row(a.bf16, a.dq, index(m) * a.D, a.D, (float)a.scale, s.dq + m * Dp);
}

// Adds what the rows and these keys give each other to s.dq and the keys' dk and dv.
inline void QueryRows::add_gradients(KeyChunks &chunks) {
  const Args &a = call.a;
  const int64_t Dp = call.Dp;
  Fp16Scales scales = convert_rows();
  while (chunks.next()) {
    for (int64_t m0 = 0; m0 < M; m0 += TILE_ROWS) {
      const int rows = (int)std::min((int64_t)TILE_ROWS, M - m0);
      if (!scores(chunks, m0, rows)) continue;
      for (int i = 0; i < visible_segments; i++) {
        const int column = visible[i].column;
        by_rows(rows, column, visible[i].of->padded, [&](int r, int count, int c, int n) {
          product<false>(count, n / 16, a.D, s.dout + (m0 + r) * Dp, Dp, visible[i].of->vt + c * Dp, 16, 16 * Dp,
                         s.dp + r * TILE_STRIDE + column + c, TILE_STRIDE, false,
                         i + 1 < visible_segments ? visible[i + 1].of->vt : visible[0].of->dv);
        });
      }
      const bool half_rows = half;
      if (half) {
        const Magnitudes of_rows = largest_gradients(m0, rows);
        use_half(!of_rows.wide());
        scales.ds = half ? 512.f * scale_to_one(of_rows.most) : 1.f;
      }
      softmax_gradients(m0, rows, scales.ds, a.dbias);
      if (a.dbias) {
        add_bias_gradient(chunks, m0, rows);
        if (half)
          for (int r = 0; r < rows; r++)
            for (int c = begin[r / GROUP]; c < end[r / GROUP]; c += W)
              put<true>(s.dp + r * TILE_STRIDE + c, load(s.dp + r * TILE_STRIDE + c) * scales.ds);
      }
      add_products(m0, rows, scales);
      use_half(half_rows);
    }
    chunks.scatter();
  }
}

// Queries and output gradients in fp16, where they are even enough; else `half` becomes false.
inline Fp16Scales QueryRows::convert_rows() {
  Fp16Scales scales;
#if defined(__AVX512FP16__)
  const int64_t Dp = call.Dp;
  Magnitudes of_q, of_dout;
  for (int64_t m = 0; half && m < M; m++) {
    of_q.add(largest_magnitude(s.q + m * Dp, Dp));
    of_dout.add(largest_magnitude(s.dout + m * Dp, Dp));
  }
  use_half(half && !of_q.wide() && !of_dout.wide());
  if (half) {
    scales.q = scale_to_one(of_q.most), scales.dout = scale_to_one(of_dout.most);
    halves_of(s.q, M * Dp, scales.q, s.q_half);
    halves_of(s.dout, M * Dp, scales.dout, s.dout_half);
  }
#endif
  return scales;
}

// dv += Pᵀ · dO, dk += dSᵀ · Q, dq += dS · K for the weights P in s.s and their gradients dS in s.dp.
inline void QueryRows::add_products(int64_t m0, int rows, [[maybe_unused]] const Fp16Scales &scales) {
  const int64_t Dp = call.Dp;
  const int panels = (int)(Dp / 16);
  runs([&](int column, const Segment &x, int n) {
    const void *next = x.kt + n * Dp;
    const float *keys_of_run = half ? nullptr : rows_of(x, n, true);
    auto to_keys = [&](const float *tile, auto use) {
      by_columns(rows, column, n, [&](int r, int count, int c, int keys) {
        use(tile + r * TILE_STRIDE + column + c, (m0 + r) * Dp, count, c * Dp, keys);
      });
    };
#if defined(__AVX512FP16__)
    if (half) {
      to_keys(s.s, [&](const float *p, int64_t row, int count, int64_t key, int keys) {
        half_product<true>(keys, Dp, count, p, s.dout_half + row, unscaled(weight_scale, scales.dout), x.dv + key,
                           x.dk);
      });
      to_keys(s.dp, [&](const float *ds, int64_t row, int count, int64_t key, int keys) {
        half_product<true>(keys, Dp, count, ds, s.q_half + row, unscaled(scales.ds, scales.q), x.dk + key, x.kh);
      });
      by_rows(rows, column, n, [&](int r, int count, int c, int keys) {
        half_product<false>(count, Dp, keys, s.dp + r * TILE_STRIDE + column + c, x.kh + c * Dp,
                            unscaled(scales.ds, call.unit_scale[unit]), s.dq + (m0 + r) * Dp, next);
      });
      return;
    }
#endif
    to_keys(s.s, [&](const float *p, int64_t row, int count, int64_t key, int keys) {
      product<true>(keys, panels, count, p, TILE_STRIDE, s.dout + row, Dp, 16, x.dv + key, Dp, true, x.dk);
    });
    to_keys(s.dp, [&](const float *ds, int64_t row, int count, int64_t key, int keys) {
      product<true>(keys, panels, count, ds, TILE_STRIDE, s.q + row, Dp, 16, x.dk + key, Dp, true, x.kn);
    });
    by_rows(rows, column, n, [&](int r, int count, int c, int keys) {
      product<false>(count, panels, keys, s.dp + r * TILE_STRIDE + column + c, TILE_STRIDE,
                     keys_of_run + c * call.kn_stride, call.kn_stride, 16, s.dq + (m0 + r) * Dp, Dp, true, next);
    });
  });
}

// What the gradients of the scores of each row of a tile can be, at most.
inline Magnitudes QueryRows::largest_gradients(int64_t m0, int rows) const {
  const float keep = call.a.drop_keys ? (float)call.a.keep : 1.f;
  Magnitudes found;
  for (int r = 0; r < rows; r++) {
    const float *dp = s.dp + r * TILE_STRIDE, *score = s.s + r * TILE_STRIDE;
    vf most = vf{};
    for (int c = begin[r / GROUP]; c < end[r / GROUP]; c += W)
      most = larger_magnitude(most, load(dp + c), load(score + c));
    const float of_row = largest_of(most);
    if (of_row > 0.f) found.add(of_row * keep + std::abs(s.delta[m0 + r]));
  }
  return found;
}

// s.s: scores → weights (after dropout); s.dp → gradients of the scores, in fp32 where `plain`. For the products.
inline void QueryRows::softmax_gradients(int64_t m0, int rows, float ds_scale, bool plain) {
  const float scale = (plain ? 1.f : ds_scale) / weight_scale, *keep = s.keep;
  with_constants([&](auto halves, auto drop) {
    auto each = [&](auto is_plain) {
      for (int r = 0; r < rows; r++) {
        if constexpr (drop) keep_row(m0 + r, s.keep);
        float *p = s.s + r * TILE_STRIDE, *dp = s.dp + r * TILE_STRIDE;
        const float lse = s.m[m0 + r], rest = s.l[m0 + r] - weight_log, delta = s.delta[m0 + r] * scale;
        for (int c = begin[r / GROUP], n = end[r / GROUP]; c < n; c += W) {
          const vf x = exp_of_difference<halves>(load(p + c), lse, rest);
          vf kept = x, dx = load(dp + c) * scale;
          if constexpr (drop) kept *= load(keep + c), dx *= load(keep + c);
          put<halves>(p + c, kept);
          put<halves && !is_plain>(dp + c, x * (dx - delta));
        }
      }
    };
    if (halves && plain)
      each(std::true_type());
    else
      each(std::false_type());
  });
}

inline void QueryRows::add_bias_gradient(const KeyChunks &chunk, int64_t m0, int rows) const {
  const Args &a = call.a;
  for (int i = 0; i < visible_segments; i++) {
    const Segment &x = *visible[i].of;
    const int column = visible[i].column;
    for (int r = 0; r < rows; r++) {
      float *to = a.dbias + ((b * a.H + head(m0 + r)) * a.NQ + (picks ? query(m0 + r) : row)) * a.K;
      const float *ds = s.dp + r * TILE_STRIDE + column;
      const int from = begin[r / GROUP] - column, stop = end[r / GROUP] - column;
      if (picks) {
        for (int c = std::max(from, 0); c < std::min(stop, x.n); c++) to[picks[m0 + r].entry] += ds[c];
        continue;
      }
      for (int k = x.first_span; k < x.first_span + x.spans; k++) {
        const Span &of = chunk.span[k];
        float sum = 0;
        for (int c = std::max(of.column, from); c < std::min(of.column + of.count, stop); c++) sum += ds[c];
        if (of.entry >= 0) to[of.entry] += sum;
      }
    }
  }
}

}  // namespace
