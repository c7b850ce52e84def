// Vectors of W floats, in the compilers' own vector types: loads, reductions, exp.
#pragma once

#include <algorithm>
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "constants.h"

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_TWICE _Pragma("clang loop unroll_count(2)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_TWICE _Pragma("GCC unroll 2")
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, MOST_PANELS = 4;
#elif defined(__AVX2__)
constexpr int W = 8, MOST_PANELS = 1;
#else
constexpr int W = 4, MOST_PANELS = 1;
#endif
constexpr int PV = 16 / W;  // vectors per panel
typedef float vf __attribute__((vector_size(4 * W)));
typedef float vf_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float v4 __attribute__((vector_size(16)));
typedef float v4_memory __attribute__((vector_size(16), aligned(4), may_alias));

inline vf load(const float *p) { return *(const vf_memory *)p; }
inline void store(float *p, vf x) { *(vf_memory *)p = x; }
inline vf broadcast(float x) { return x - vf{}; }  // x + 0 would cost an addition, for the sake of −0
inline vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// The larger of `most` and the magnitude of x, where the score is above −inf; else `most`.
inline vf larger_magnitude(vf most, vf x, vf score) {
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)score, (__m512)broadcast(-INF), _CMP_GT_OQ);
  return (vf)_mm512_mask_range_ps((__m512)most, counts, (__m512)most, (__m512)x, 0xb);  // of magnitudes the larger
#else
  return larger(score > broadcast(-INF) ? magnitude(x) : vf{}, most);
#endif
}

inline float largest_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float r = x[0];
  for (int i = 1; i < W; i++) r = std::max(r, (float)x[i]);
  return r;
#endif
}

inline bool any_above(vf x, float bound) {  // or NaN
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)broadcast(bound), _CMP_NLE_UQ) != 0;
#else
  for (int i = 0; i < W; i++)
    if (!(x[i] <= bound)) return true;
  return false;
#endif
}

inline float sum_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float r = 0;
  for (int i = 0; i < W; i++) r += x[i];
  return r;
#endif
}

// exp to one or two units in the last place (a minimax polynomial); 0 below −87, NaN stays NaN.
inline vf exp_of(vf x) {
  const float log2e = LOG2E, ln2 = 0.693147180559945f;
  const float magic = 12582912.f;  // adding it leaves the rounded integer in the low bits
  const vf low = broadcast(-87.f);
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
#else
  const vf high = broadcast(88.f), given = x;
  x = x < low ? low : x;
  x = x > high ? high : x;
#endif
  const vf shifted = x * log2e + magic, n = shifted - magic;
  const vf r = x - n * ln2;  // ln2's own error, times n, stays below the rounding of the scores
  vf p = r * 8.290314729e-3f + 4.189792939e-2f;
  p = p * r + 1.66676362e-1f;
  p = p * r + 4.999914953e-1f;
  p = p * r + 9.999997072e-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n);
#else
  p = (vf)((vi)p + ((vi)shifted << 23));
  p = given < low ? vf{} : p;
  return given == given ? p : given;
#endif
}

// exp((x − most) − rest): of large scores their sum `most + rest` would lose the rest. HALF: for weights that become
// fp16, from 2^fraction, 1 ± 3e-6 but for the exponent's rounding.
template <bool HALF>
inline vf exp_of_difference(vf x, float most, float rest) {
#if defined(__AVX512FP16__)
  if constexpr (HALF) {
    constexpr int FRACTION = 0x9;  // what is above the integer below; 0 of −inf
    const __m512 exponent = _mm512_fmsub_ps((__m512)(x - most), _mm512_set1_ps(LOG2E), _mm512_set1_ps(rest * LOG2E));
    const vf r = (vf)_mm512_reduce_ps(exponent, FRACTION);
    vf p = r * 0.013534168f + 0.05201146108f;
    p = p * r + 0.2414427561f;
    p = p * r + 0.6930038348f;
    p = p * r + 1.000002593f;
    return (vf)_mm512_scalef_ps((__m512)p, exponent);
  }
#endif
  return exp_of(x - most - rest);
}

}  // namespace
