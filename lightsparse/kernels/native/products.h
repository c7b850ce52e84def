// fp32 matrix products: C[M, 16 · panels] (+)= A · B.
//
// A[i, k] = a[i · lda + k], or with TA a[k · lda + i]. B's row k lies at b + k · bk, its panel j at + j · bj.
// What the next product reads, at `next`, is fetched into the first cache meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace {

template <int MR, int NP, bool TA>
__attribute__((noinline)) void product_tile(int64_t K, const float *a, int64_t lda, const float *b, int64_t bk,
                                            int64_t bj, float *c, int64_t ldc, bool add, const char *ahead) {
  constexpr int NV = NP * PV;
  vf sum[MR][NV];
  UNROLL
  for (int i = 0; i < MR; i++)
    UNROLL
    for (int j = 0; j < NV; j++) sum[i][j] = vf{};
  if (add)
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NP; j++) __builtin_prefetch(c + i * ldc + j * 16, 1);
  UNROLL_TWICE
  for (int64_t k = 0; k < K; k++) {
    vf row[NV];
    UNROLL
    for (int j = 0; j < NV; j++) row[j] = load(b + (j / PV) * bj + (j % PV) * W);
    UNROLL
    for (int i = 0; i < MR; i++) {
      vf x = broadcast(TA ? a[i] : a[i * lda]);
      UNROLL
      for (int j = 0; j < NV; j++) sum[i][j] += x * row[j];
    }
    b += bk;
    a += TA ? lda : 1;
    __builtin_prefetch(ahead);
    ahead += 64;
  }
  asm("" : "+r"(c), "+r"(ldc));  // else the addresses of the loads above are kept through the loop, on the stack
  UNROLL
  for (int i = 0; i < MR; i++)
    UNROLL
    for (int j = 0; j < NV; j++)
      store(c + i * ldc + j * W, add ? load(c + i * ldc + j * W) + sum[i][j] : sum[i][j]);
}

template <int NP, bool TA>
void product_panels(int M, int64_t K, const float *a, int64_t lda, const float *b, int64_t bk, int64_t bj, float *c,
                    int64_t ldc, bool add, const char *&ahead) {
  constexpr int MR = W == 4 ? 3 : (W == 8 || NP == 4) ? 6 : NP == 3 ? 8 : 12;  // sums that fit into the registers
  int i = 0;
  auto rows = [&](auto count) {
    constexpr int n = decltype(count)::value;
    if constexpr (n <= MR)
      for (; i + n <= M && !(n == 6 && M - i == 8); i += n, ahead += 64 * K)  // 4 + 4 rows are better than 6 + 2
        product_tile<n, NP, TA>(K, a + (TA ? i : i * lda), lda, b, bk, bj, c + i * ldc, ldc, add, ahead);
  };
  rows(std::integral_constant<int, MR>());
  rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 2>());
  rows(std::integral_constant<int, 1>());
}

template <bool TA>
void product(int M, int panels, int64_t K, const float *a, int64_t lda, const float *b, int64_t bk, int64_t bj,
             float *c, int64_t ldc, bool add, const void *next) {
  const char *ahead = (const char *)next;
  while (panels > 0) {
    int now = std::min(panels, MOST_PANELS);
    if (MOST_PANELS == 4 && panels == 5) now = 3;
    switch (now) {
      case 1: product_panels<1, TA>(M, K, a, lda, b, bk, bj, c, ldc, add, ahead); break;
#if defined(__AVX512F__)
      case 2: product_panels<2, TA>(M, K, a, lda, b, bk, bj, c, ldc, add, ahead); break;
      case 3: product_panels<3, TA>(M, K, a, lda, b, bk, bj, c, ldc, add, ahead); break;
      case 4: product_panels<4, TA>(M, K, a, lda, b, bk, bj, c, ldc, add, ahead); break;
#endif
    }
    panels -= now, b += now * bj, c += now * 16;
  }
}

}  // namespace
