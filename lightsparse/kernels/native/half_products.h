// fp16 matrix products, where the CPU multiplies fp16: C += factor · A · B.
//
// FP16_TERMS terms are summed in fp16, those sums in fp32. A lies in a score tile, each number twice (`store_twice`), at
// a constant stride because 13 rows have more addresses than there are registers. B is [K][ldb].
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

#if defined(__AVX512FP16__)

namespace {

inline void store_twice(float *to, vf x) {  // 16 numbers, each as two equal fp16 numbers side by side
  const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8,  //
                                         7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m256i halves = _mm256_castph_si256(_mm512_cvtxps_ph((__m512)x));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(halves)));
}

template <int MR, int NV, bool TA>
__attribute__((noinline)) void half_tile(int64_t K, const float *a, const uint16_t *b, int64_t ldb, float factor,
                                         float *c, int64_t ldc, const char *ahead) {
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < 2 * NV; j++) __builtin_prefetch(c + i * ldc + j * 16, 1);
  while (K > 0) {
    const int64_t terms = std::min(K, FP16_TERMS);
    __m512h sum[MR][NV];
    UNROLL
    for (int i = 0; i < MR; i++)
      UNROLL
      for (int j = 0; j < NV; j++) sum[i][j] = _mm512_setzero_ph();
    UNROLL_TWICE
    for (int64_t k = 0; k < terms; k++) {
      __m512h row[NV];
      UNROLL
      for (int j = 0; j < NV; j++) row[j] = _mm512_loadu_ph(b + j * 32);
      UNROLL
      for (int i = 0; i < MR; i++) {
        const __m512h x = _mm512_castps_ph(_mm512_set1_ps(TA ? a[i] : a[i * TILE_STRIDE]));
        UNROLL
        for (int j = 0; j < NV; j++) sum[i][j] = _mm512_fmadd_ph(x, row[j], sum[i][j]);
      }
      b += ldb;
      a += TA ? TILE_STRIDE : 1;
      __builtin_prefetch(ahead);
      ahead += 64;
    }
    asm("" : "+r"(c), "+r"(ldc));
    UNROLL
    for (int i = 0; i < MR; i++)
      UNROLL
      for (int j = 0; j < NV; j++) {
        float *to = c + i * ldc + j * 32;
        const __m512d both = (__m512d)sum[i][j];
        const vf low = (vf)_mm512_cvtxph_ps(_mm256_castpd_ph(_mm512_castpd512_pd256(both)));
        const vf high = (vf)_mm512_cvtxph_ps(_mm256_castpd_ph(_mm512_extractf64x4_pd(both, 1)));
        store(to, load(to) + low * factor);
        store(to + 16, load(to + 16) + high * factor);
      }
    K -= terms;
  }
}

template <int NV, bool TA>
void half_columns(int M, int64_t K, const float *a, const uint16_t *b, int64_t ldb, float factor, float *c,
                  int64_t ldc, const char *&ahead) {
  int i = 0, stop = M;
  auto rows = [&](auto count) {
    constexpr int n = decltype(count)::value;
    for (; i + n <= stop; i += n, ahead += 64 * K)
      half_tile<n, NV, TA>(K, a + (TA ? i : i * TILE_STRIDE), b, ldb, factor, c + i * ldc, ldc, ahead);
  };
  const int twelves = (13 - M % 13) % 13;  // with so many tiles of 12 rows, the others have 13
  stop = M >= 12 * twelves ? M - 12 * twelves : 0;
  rows(std::integral_constant<int, 13>());
  stop = M;
  rows(std::integral_constant<int, 12>());
  rows(std::integral_constant<int, 8>());
  rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 1>());
}

template <bool TA>
void half_product(int M, int64_t Dp, int64_t K, const float *a, const uint16_t *b, float factor, float *c,
                  const void *next) {
  const char *ahead = (const char *)next;
  for (int64_t d = 0; d < Dp; d += 64)
    if (d + 64 <= Dp)
      half_columns<2, TA>(M, K, a, b + d, Dp, factor, c + d, Dp, ahead);
    else
      half_columns<1, TA>(M, K, a, b + d, Dp, factor, c + d, Dp, ahead);
}

}  // namespace

#endif
