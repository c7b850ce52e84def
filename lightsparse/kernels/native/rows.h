// Rows of tensors: fp32 or bf16 in memory, fp32 here; their magnitudes, and panels of 16 of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace {

inline float from_bf16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float f) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return f == f ? (uint16_t)rounded : (uint16_t)((bits >> 16) | 0x40u);
}

void read_row(bool bf16, const void *base, int64_t offset, int64_t D, int64_t Dp, float scale, float *to) {
  if (bf16) {
    const uint16_t *from = (const uint16_t *)base + offset;
    for (int64_t d = 0; d < D; d++) to[d] = from_bf16(from[d]) * scale;
  } else {
    const float *from = (const float *)base + offset;
    for (int64_t d = 0; d < D; d++) to[d] = from[d] * scale;
  }
  for (int64_t d = D; d < Dp; d++) to[d] = 0.f;
}

void write_row(bool bf16, void *base, int64_t offset, int64_t D, float scale, const float *from) {
  if (bf16) {
    uint16_t *to = (uint16_t *)base + offset;
    for (int64_t d = 0; d < D; d++) to[d] = to_bf16(from[d] * scale);
  } else {
    float *to = (float *)base + offset;
    for (int64_t d = 0; d < D; d++) to[d] = from[d] * scale;
  }
}

// The power of two that brings numbers up to `most` to at most 1, or near 1 where it would leave the normal numbers.
inline float scale_to_one(float most) {
  int exponent = 0;
  if (most > 0.f && most < INF) std::frexp(most, &exponent);
  return std::ldexp(1.f, -std::max(-100, std::min(126, exponent)));
}

// The factor that undoes two scales. Finite, because 0 times it must be 0.
inline float unscaled(float a, float b) {
  return (float)std::min(1. / ((double)a * b), (double)std::numeric_limits<float>::max());
}

// Of the largest magnitude of each row, the largest and (rows of zeros left out) the smallest over all rows.
struct Magnitudes {
  float most = 0.f, least = INF;

  void add(float of_row) {
    most = std::max(most, of_row);
    if (of_row > 0.f) least = std::min(least, of_row);
  }
  bool wide() const { return most > FP16_SPREAD * least; }
};

#if defined(__AVX512FP16__)
void halves_of(const float *from, int64_t n, float scale, uint16_t *to) {  // n a multiple of 16
  for (int64_t d = 0; d < n; d += 16) _mm256_storeu_ph(to + d, _mm512_cvtxps_ph((__m512)(load(from + d) * scale)));
}
#endif

inline float largest_magnitude(const float *x, int64_t n) {  // of the finite ones; n a multiple of 16
  vf most = vf{};
  for (int64_t i = 0; i < n; i += W) {
    const vf found = magnitude(load(x + i));
    most = larger(most, found < broadcast(INF) ? found : vf{});
  }
  return largest_of(most);
}

inline v4 interleave_low(v4 a, v4 b) { return v4{a[0], b[0], a[1], b[1]}; }  // one instruction on x86 (unpcklps)
inline v4 interleave_high(v4 a, v4 b) { return v4{a[2], b[2], a[3], b[3]}; }

// 16 rows of Dp, `stride` apart → a panel [Dp][16]
void transpose_panel(const float *rows, int64_t stride, int64_t Dp, float *panel) {
  for (int64_t d = 0; d < Dp; d += 4)
    for (int j = 0; j < 16; j += 4) {
      v4 a = *(const v4_memory *)(rows + (j + 0) * stride + d), b = *(const v4_memory *)(rows + (j + 1) * stride + d);
      v4 c = *(const v4_memory *)(rows + (j + 2) * stride + d), e = *(const v4_memory *)(rows + (j + 3) * stride + d);
      v4 ac_low = interleave_low(a, c), ac_high = interleave_high(a, c);
      v4 be_low = interleave_low(b, e), be_high = interleave_high(b, e);
      float *to = panel + d * 16 + j;
      *(v4_memory *)(to) = interleave_low(ac_low, be_low);
      *(v4_memory *)(to + 16) = interleave_high(ac_low, be_low);
      *(v4_memory *)(to + 32) = interleave_low(ac_high, be_high);
      *(v4_memory *)(to + 48) = interleave_high(ac_high, be_high);
    }
}

}  // namespace
