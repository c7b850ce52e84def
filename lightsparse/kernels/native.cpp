// The `native` backend: flash attention over the tiles of a block layout, forward and backward.
//
// Arithmetic is fp32. For bf16 inputs on a CPU that multiplies fp16 (AVX512-FP16, twice the rate of fp32), the four
// products with weights or gradients of scores are fp16: 11 bits, where PyTorch's dense attention rounds both to the 8
// of bf16. Powers of two keep them in range, and a few dozen terms are summed before they join an fp32 sum. Where one row
// is larger than another by more than WIDEST, the smaller would lose its bits: such products stay fp32. Scores and dP
// always are. (VDPBF16PS runs at half the rate of fp32 on Intel's CPUs: measured 86 against 174 GFLOP/s.)
// Forward (Dao et al. 2022, arXiv 2205.14135): a row's keys come in chunks; a running maximum m and sum l rescale what
// has been summed so far. Backward: P = exp(S − lse) again, delta = rowsum(dO · O) − dlse, dS = P · (dP − delta).
// A tile has 64 rows; each 16 of them leave out the keys before the first and after the last one they may see.
// Where every query has a list of blocks of its own (q_block = 1) and many choose the same, the walk goes by key block
// over the rows of some thousand queries at a time: the rows that chose it meet it together (`Portion`).
// Memory is linear in the tokens. Results depend on the number of threads only, never on their timing.
//
// Names: a unit is one (sample, key/value head); G query heads of it walk one table together, or nz tables one by one.
// Dp = head dim rounded up to 16. A panel holds 16 keys transposed, [D][16], so that scores of 16 keys are one vector.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

extern "C" struct Args {  // the order of native_build.Arguments; every field is 8 bytes wide
  int64_t B, H, Hkv, Nq, Nkv, D, table_batch, table_heads, NQ, K, q_block, kv_block, dense_count, bf16, threads;
  double scale;
  const void *q, *k, *v, *out_saved, *dout;        // strides below; the last dimension is contiguous
  int64_t sq[3], sk[3], sv[3], sdo[3];             // elements per sample, head, token
  void *out, *dq, *dk, *dv;                        // contiguous, as is out_saved
  float *lse;                                      // [B, H, Nq]
  const float *dlse;                               // [B, H, Nq] or null
  const int32_t *table;                            // [table_batch, table_heads, NQ, K]
  const uint8_t *dense_row;                        // [NQ]
  const int32_t *q_pos, *from, *until, *q_doc, *kv_doc;
  int64_t q_pos_b, from_b, until_b, q_doc_b, kv_doc_b;  // elements per sample, 0 where all samples share
  const float *bias;                               // or null
  int64_t bias_b, bias_h, bias_group;              // elements per sample and bias head; query heads per bias head
  float *dbias;                                    // [B, H, NQ, K], zeros at first
  const int64_t *drop_keys, *key_ids;              // [B], [Nkv]; or null
  int64_t drop_below;                              // of 2^31
  double keep;                                     // 1 / (1 − rate)
  void *work;                                      // `native_workspace` bytes
};

namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int ROWS = 64;    // query rows of a score tile
constexpr int SEGMENT = 64; // keys that lie side by side
constexpr int CHUNK = 128;  // keys of a score tile
constexpr int GROUP = 16;   // rows of a score tile that skip hidden panels together
constexpr int STRIDE = CHUNK + 16;  // of its rows: a power of two would crowd a column into few cache sets
constexpr int64_t TERMS = 64;      // that are summed in fp16 before they join a sum in fp32
constexpr float WIDEST = 4096.f;  // largest magnitude of a row over that of another, for products in fp16
constexpr float SLACK = 2.f;       // growth of a row's maximum that changes nothing
constexpr int64_t PORTION_ROWS = 4096;  // query rows whose picks are walked by key block
constexpr int64_t FEW_PICKS = 2;        // of a key block in a portion, on average: below, every row walks its own list
constexpr int64_t ITEM_ROWS = 512;  // query rows (times G) that meet a chunk of keys while it is in cache

// ---- vectors ---------------------------------------------------------------------------------------------------

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
typedef int32_t i4 __attribute__((vector_size(16)));

inline vf load(const float *p) { return *(const vf_memory *)p; }
inline void store(float *p, vf x) { *(vf_memory *)p = x; }
inline vf all(float x) { return x - vf{}; }  // x + 0 would cost an addition, for the sake of −0

inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// The larger of `most` and the magnitude of x, where the score is above −inf.
inline vf larger_magnitude(vf most, vf x, vf score) {
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)score, (__m512)all(-INF), _CMP_GT_OQ);
  return (vf)_mm512_mask_range_ps((__m512)most, counts, (__m512)most, (__m512)x, 0xb);  // magnitudes, the larger
#else
  const vf of = (vf)((vi)x & 0x7fffffff);
  return larger(score > all(-INF) ? of : vf{}, most);
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

inline bool any_above(vf x, float bound) {  // or no number
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)all(bound), _CMP_NLE_UQ) != 0;
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
  const vf low = all(-87.f);
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
#else
  const vf high = all(88.f), given = x;
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

// exp(x − shift), for weights that will be HALF: from 2^fraction, 1 ± 3e-6 but for the rounding of the exponent.
template <bool HALF>
inline vf exp_less(vf x, float shift) {
#if defined(__AVX512FP16__)
  if constexpr (HALF) {
    constexpr int FRACTION = 0x9;  // what is above the integer below; 0 of −inf
    const __m512 exponent = _mm512_fmsub_ps((__m512)x, _mm512_set1_ps(LOG2E), _mm512_set1_ps(shift * LOG2E));
    const vf r = (vf)_mm512_reduce_ps(exponent, FRACTION);
    vf p = r * 0.013534168f + 0.05201146108f;
    p = p * r + 0.2414427561f;
    p = p * r + 0.6930038348f;
    p = p * r + 1.000002593f;
    return (vf)_mm512_scalef_ps((__m512)p, exponent);
  }
#endif
  return exp_of(x - shift);
}

// ---- products: C[M, 16 · panels] (+)= A · B ----------------------------------------------------------------------
// A[i, k] = a[i · lda + k], or with TA a[k · lda + i]. B's row k lies at b + k · bk, its panel j at + j · bj.
// What the next product reads, at `next`, is fetched into the first cache meanwhile.

template <int MR, int NP, bool TA>
__attribute__((noinline)) void product_tile(int64_t K, const float *a, int64_t lda, const float *b, int64_t bk,
                                            int64_t bj, float *c, int64_t ldc, bool add, const char *ahead) {
  constexpr int NV = NP * PV;
  vf sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) sum[i][j] = vf{};
  if (add)
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < NP; j++) __builtin_prefetch(c + i * ldc + j * 16, 1);
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; k++) {
    vf row[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) row[j] = load(b + (j / PV) * bj + (j % PV) * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      vf x = all(TA ? a[i] : a[i * lda]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) sum[i][j] += x * row[j];
    }
    b += bk;
    a += TA ? lda : 1;
    __builtin_prefetch(ahead);
    ahead += 64;
  }
  asm("" : "+r"(c), "+r"(ldc));  // else the addresses of the loads above are kept through the loop, on the stack
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
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

#if defined(__AVX512FP16__)

inline void store_twice(float *to, vf x) {  // 16 numbers, each as two equal fp16 numbers side by side
  const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8,  //
                                         7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m256i halves = _mm256_castph_si256(_mm512_cvtxps_ph((__m512)x));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(halves)));
}

// C += factor · A · B in fp16, TERMS terms at a time, those sums in fp32. A as `store_twice` leaves it in a score tile
// (a constant stride: 13 rows have more addresses than there are registers), B [K][ldb].
template <int MR, int NV, bool TA>
__attribute__((noinline)) void half_tile(int64_t K, const float *a, const uint16_t *b, int64_t ldb, float factor,
                                         float *c, int64_t ldc, const char *ahead) {
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < 2 * NV; j++) __builtin_prefetch(c + i * ldc + j * 16, 1);
  while (K > 0) {
    const int64_t terms = std::min(K, TERMS);
    __m512h sum[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) sum[i][j] = _mm512_setzero_ph();
#pragma GCC unroll 2
    for (int64_t k = 0; k < terms; k++) {
      __m512h row[NV];
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) row[j] = _mm512_loadu_ph(b + j * 32);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        const __m512h x = _mm512_castps_ph(_mm512_set1_ps(TA ? a[i] : a[i * STRIDE]));
#pragma GCC unroll 16
        for (int j = 0; j < NV; j++) sum[i][j] = _mm512_fmadd_ph(x, row[j], sum[i][j]);
      }
      b += ldb;
      a += TA ? STRIDE : 1;
      __builtin_prefetch(ahead);
      ahead += 64;
    }
    asm("" : "+r"(c), "+r"(ldc));
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
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
      half_tile<n, NV, TA>(K, a + (TA ? i : i * STRIDE), b, ldb, factor, c + i * ldc, ldc, ahead);
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

#endif

// ---- rows of tensors -----------------------------------------------------------------------------------------------

inline float of_bf16(uint16_t x) {
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
    for (int64_t d = 0; d < D; d++) to[d] = of_bf16(from[d]) * scale;
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

// The power of two that brings numbers up to `most` to at most 1, or near it where it would be no normal number.
inline float scale_to_one(float most) {
  int exponent = 0;
  if (most > 0.f && most < INF) std::frexp(most, &exponent);
  return std::ldexp(1.f, -std::max(-100, std::min(126, exponent)));
}

// What takes the scales of two factors back: finite, for 0 times it must be 0.
inline float unscaled(float a, float b) {
  return (float)std::min(1. / ((double)a * b), (double)std::numeric_limits<float>::max());
}

struct Magnitudes {  // the largest of each row: of all rows the largest and, but for rows of zeros, the smallest
  float most = 0.f, least = INF;
  void add(float of_row) {
    most = std::max(most, of_row);
    if (of_row > 0.f) least = std::min(least, of_row);
  }
  bool wide() const { return most > WIDEST * least; }
};

#if defined(__AVX512FP16__)
void halves_of(const float *from, int64_t n, float scale, uint16_t *to) {  // n a multiple of 16
  for (int64_t d = 0; d < n; d += 16) _mm256_storeu_ph(to + d, _mm512_cvtxps_ph((__m512)(load(from + d) * scale)));
}
#endif

inline float largest_magnitude(const float *x, int64_t n) {  // of the finite ones; n a multiple of 16
  vf most = vf{};
  for (int64_t i = 0; i < n; i += W) {
    const vf of = (vf)((vi)load(x + i) & 0x7fffffff);
    most = larger(most, of < all(INF) ? of : vf{});
  }
  return largest_of(most);
}

// 16 rows of Dp, `stride` apart → a panel [Dp][16]
void transpose_panel(const float *rows, int64_t stride, int64_t Dp, float *panel) {
  for (int64_t d = 0; d < Dp; d += 4)
    for (int j = 0; j < 16; j += 4) {
      v4 a = *(const v4_memory *)(rows + (j + 0) * stride + d), b = *(const v4_memory *)(rows + (j + 1) * stride + d);
      v4 c = *(const v4_memory *)(rows + (j + 2) * stride + d), e = *(const v4_memory *)(rows + (j + 3) * stride + d);
      v4 ab_low = __builtin_shuffle(a, b, i4{0, 4, 1, 5}), ab_high = __builtin_shuffle(a, b, i4{2, 6, 3, 7});
      v4 ce_low = __builtin_shuffle(c, e, i4{0, 4, 1, 5}), ce_high = __builtin_shuffle(c, e, i4{2, 6, 3, 7});
      float *to = panel + d * 16 + j;
      *(v4_memory *)(to) = __builtin_shuffle(ab_low, ce_low, i4{0, 1, 4, 5});
      *(v4_memory *)(to + 16) = __builtin_shuffle(ab_low, ce_low, i4{2, 3, 6, 7});
      *(v4_memory *)(to + 32) = __builtin_shuffle(ab_high, ce_high, i4{0, 1, 4, 5});
      *(v4_memory *)(to + 48) = __builtin_shuffle(ab_high, ce_high, i4{2, 3, 6, 7});
    }
}

// ---- dropout: the hash of hashing.py and dropout.py ----------------------------------------------------------------

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
inline uint64_t chained(uint64_t state, uint64_t number) { return mix(state + number * 0x9E3779B97F4A7C15ull + 1); }
inline uint64_t key_hash(uint64_t key) { return mix(key * 0x165667B19E3779F9ull); }

void keep_factors(uint64_t row, const uint64_t *keys, int n, int np, uint64_t below, float keep, float *to) {
  for (int c = 0; c < n; c++) {
    uint64_t bits = (mix(row ^ keys[c]) >> 20) & 0x7fffffffull;
    to[c] = bits >= below ? keep : 0.f;
  }
  for (int c = n; c < np; c++) to[c] = 0.f;
}

// ---- threads -------------------------------------------------------------------------------------------------------

// Threads of one call; `run` gives every one of them the same function and returns when all are done.
class Team {
 public:
  explicit Team(int wanted) {
    try {
      for (int i = 1; i < wanted; i++) threads_.emplace_back([this, i] { work(i); });
    } catch (...) {  // fewer threads than asked for: the work is divided among those there are
    }
  }
  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = nullptr, round_++;
    }
    start_.notify_all();
    for (auto &thread : threads_) thread.join();
  }
  int size() const { return (int)threads_.size() + 1; }
  void run(const std::function<void(int)> &task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task, busy_ = (int)threads_.size(), round_++;
    }
    start_.notify_all();
    task(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work(int me) {
    for (uint64_t seen = 0;;) {
      const std::function<void(int)> *task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return round_ != seen; });
        seen = round_, task = task_;
      }
      if (!task) return;
      (*task)(me);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int)> *task_ = nullptr;
  uint64_t round_ = 0;
  int busy_ = 0;
  std::vector<std::thread> threads_;
};

// ---- the call and its buffers --------------------------------------------------------------------------------------

struct Bounds {  // of the keys of a panel or segment
  int32_t from_min, from_max, until_min, until_max, doc_min, doc_max;
  void none() {
    from_min = until_min = doc_min = INT32_MAX;
    from_max = until_max = doc_max = INT32_MIN;
  }
  void add(const Bounds &o) {
    from_min = std::min(from_min, o.from_min), from_max = std::max(from_max, o.from_max);
    until_min = std::min(until_min, o.until_min), until_max = std::max(until_max, o.until_max);
    doc_min = std::min(doc_min, o.doc_min), doc_max = std::max(doc_max, o.doc_max);
  }
};

struct Reach {  // of some rows
  int32_t pos_min = INT32_MAX, pos_max = INT32_MIN, doc_min = INT32_MAX, doc_max = INT32_MIN;
  void add(const Reach &o) {
    pos_min = std::min(pos_min, o.pos_min), pos_max = std::max(pos_max, o.pos_max);
    doc_min = std::min(doc_min, o.doc_min), doc_max = std::max(doc_max, o.doc_max);
  }
  bool misses(const Bounds &of, bool docs) const {
    if (of.from_min > pos_max || of.until_max <= pos_min) return true;
    return docs && (of.doc_min > doc_max || of.doc_max < doc_min);
  }
};

struct Span {  // columns of a segment that belong to one entry of the table
  int entry, column, count;
};

struct Segment {
  int n, np, panel, spans, first_span;  // keys; rounded up to 16
  const float *kt, *vt, *kn, *vn;       // panels, rows
  const uint16_t *kh = nullptr, *vh = nullptr;  // rows in fp16
  const int32_t *from, *until, *doc;
  const uint64_t *hashes;
  int64_t key;      // its first
  float *dk, *dv;   // rows of Dp
  Bounds bounds;
};

struct Live {  // a segment that the rows of a tile see at least a part of
  const Segment *of;
  int column;
  bool masked;
};

struct Pick {  // one entry of the table of one query head
  int32_t row, entry;  // row of the portion: (query − its first) · heads + head
};

struct Scratch {  // of one thread
  float *q, *dout, *sums, *dq;          // [item rows][Dp]; sums: out
  float *m, *l, *delta;                 // [item rows], l [item rows][W]; in the backward m is the lse
  int32_t *pos, *doc;                   // [item rows]
  Reach *reach;                         // [item rows / GROUP]: of each group of rows
  uint64_t *hash;                       // [item rows]
  float *s, *dp, *keep;                 // [ROWS][STRIDE], [ROWS][STRIDE], [CHUNK]
  float *kt, *vt, *kn, *vn, *dk, *dv;   // [CHUNK][Dp]: gathered
  int32_t *from, *until, *kv_doc;       // [CHUNK]
  int64_t *ids;
  uint64_t *hashes;
  float *rows16;                        // [16][Dp]
  float *rows;                          // [CHUNK][Dp]: keys or values of a unit whose products stay fp32
  uint16_t *q_half, *dout_half;         // [item rows][Dp]
  Pick *picks;                          // of a portion, block by block
  int64_t *stop;                        // [NB + 1]: where the picks of the blocks before end
  float *row_m, *row_l, *row_delta;     // [portion rows]
  float *row_sums, *row_dout;           // [portion rows][Dp]; in the backward row_sums is dq
};

struct Carver {  // hands out pieces of one buffer, or only counts them
  char *base;
  int64_t used = 0;
  template <class T>
  T *take(int64_t count) {
    T *at = base ? (T *)(base + used) : nullptr;
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return at;
  }
};

struct Call {
  const Args &a;
  bool backward;
  bool gather;    // nothing is packed ahead
  bool direct;    // rows of k, v, dk, dv are used as they are
  bool by_block;  // rows of single queries, walked by key block
  bool half;      // products with weights and their gradients are fp16
  int64_t Dp, kbp, NB, G, nz, units, panels, item_rows, portion, mask_batch, kn_stride, vn_stride;
  int threads;
  float *kt = nullptr, *vt = nullptr, *kn = nullptr, *vn = nullptr, *dk = nullptr, *dv = nullptr, *slabs = nullptr;
  Bounds *bounds = nullptr;
  uint64_t *hashes = nullptr;
  uint16_t *kh = nullptr, *vh = nullptr;
  float *unit_scale = nullptr;  // [units]; 0 where products stay fp32
  float weight_scale = 1.f, weight_log = 0.f;  // of fp16 weights, and its logarithm
  std::vector<Scratch> scratch;
  int64_t bytes;

  Call(const Args &args, bool backward_, char *work) : a(args), backward(backward_) {
    Dp = (a.D + 15) / 16 * 16;
    kbp = (a.kv_block + 15) / 16 * 16;
    NB = (a.Nkv + a.kv_block - 1) / a.kv_block;
    bool own_tables = a.table_heads == a.H;
    G = own_tables ? 1 : a.H / a.Hkv;
    nz = own_tables ? a.H / a.Hkv : 1;
    units = a.B * a.Hkv;
    panels = NB * kbp / 16;
    // Packing pays when keys are read more than once or twice; panels of tiny blocks would be mostly padding.
    gather = a.kv_block < 16 || nz * (a.NQ * a.K + a.dense_count * NB) <= 2 * NB;
    direct = !a.bf16 && Dp == a.D;
#if defined(__AVX512FP16__)
    half = a.bf16 && !gather && Dp % 32 == 0;
    // So that a sum of weights up to exp(SLACK), times numbers up to 1, stays below 65504, the largest in fp16.
    if (half) weight_scale = 128.f * (a.drop_keys ? scale_to_one((float)a.keep) : 1.f);
    weight_log = std::log(weight_scale);
#else
    half = false;
#endif
    item_rows = std::min(std::max(ITEM_ROWS / G, (int64_t)1), a.q_block) * G;
    portion = std::min(std::max(PORTION_ROWS / (a.H / a.Hkv), (int64_t)1), a.Nq);
    int64_t portion_rows = portion * (a.H / a.Hkv);
    by_block = a.q_block == 1 && !gather && portion_rows * a.K >= FEW_PICKS * NB;
    if (by_block) item_rows = std::max(item_rows, (int64_t)ROWS);
    mask_batch = (a.from_b || a.until_b || a.kv_doc_b) ? a.B : 1;
    kn_stride = gather || !direct ? Dp : a.sk[2];
    vn_stride = gather || !direct ? Dp : a.sv[2];
    double work_of_call = (double)a.B * a.H * a.Nq * std::min(a.K * a.kv_block + a.dense_count, a.Nkv) * a.D;
    threads = (int)std::max((int64_t)1, std::min(a.threads, (int64_t)(work_of_call / 4e5) + 1));

    Carver carve{work};
    int64_t of_units = units * a.Nkv * Dp;
    if (!gather) {
      kt = carve.take<float>(units * panels * 16 * Dp);
      if (backward) vt = carve.take<float>(units * panels * 16 * Dp);
      if (half) {
        (backward ? kh : vh) = carve.take<uint16_t>(of_units);
        unit_scale = carve.take<float>(units);
      } else if (!direct) {
        (backward ? kn : vn) = carve.take<float>(of_units);
      }
      bounds = carve.take<Bounds>(mask_batch * panels);
    }
    if (a.drop_keys) hashes = carve.take<uint64_t>(a.Nkv);
    if (backward) {
      dk = direct ? (float *)a.dk : carve.take<float>(of_units);
      dv = direct ? (float *)a.dv : carve.take<float>(of_units);
      slabs = carve.take<float>((threads - 1) * 2 * a.Nkv * Dp);
    }
    scratch.resize(threads);
    for (Scratch &s : scratch) {
      s.q = carve.take<float>(item_rows * Dp);
      s.dout = carve.take<float>(backward ? item_rows * Dp : 0);
      s.sums = carve.take<float>(backward ? 0 : item_rows * Dp);
      s.dq = carve.take<float>(backward ? item_rows * Dp : 0);
      s.m = carve.take<float>(item_rows), s.l = carve.take<float>(item_rows * W);
      s.delta = carve.take<float>(item_rows);
      s.pos = carve.take<int32_t>(item_rows), s.doc = carve.take<int32_t>(item_rows);
      s.reach = carve.take<Reach>((item_rows + GROUP - 1) / GROUP);
      s.hash = carve.take<uint64_t>(item_rows);
      s.s = carve.take<float>(ROWS * STRIDE), s.dp = carve.take<float>(ROWS * STRIDE);
      s.keep = carve.take<float>(CHUNK);
      int64_t held = gather ? CHUNK * Dp : 0;
      s.kt = carve.take<float>(held), s.vt = carve.take<float>(held), s.kn = carve.take<float>(held);
      s.vn = carve.take<float>(held), s.dk = carve.take<float>(held), s.dv = carve.take<float>(held);
      s.from = carve.take<int32_t>(CHUNK), s.until = carve.take<int32_t>(CHUNK);
      s.kv_doc = carve.take<int32_t>(CHUNK), s.ids = carve.take<int64_t>(CHUNK);
      s.hashes = carve.take<uint64_t>(CHUNK);
      s.rows16 = carve.take<float>(16 * Dp);
      s.rows = carve.take<float>(half ? CHUNK * Dp : 0);
      int64_t halves = half && backward ? item_rows * Dp : 0;
      s.q_half = carve.take<uint16_t>(halves), s.dout_half = carve.take<uint16_t>(halves);
      int64_t rows = by_block ? portion_rows : 0;
      s.picks = carve.take<Pick>(rows * a.K);
      s.stop = carve.take<int64_t>(by_block ? NB + 1 : 0);
      s.row_m = carve.take<float>(rows), s.row_l = carve.take<float>(rows), s.row_delta = carve.take<float>(rows);
      s.row_sums = carve.take<float>(rows * Dp), s.row_dout = carve.take<float>(backward ? rows * Dp : 0);
    }
    bytes = carve.used;
  }

  const int32_t *table_row(int64_t unit, int64_t z, int64_t row) const {
    int64_t b = unit / a.Hkv, hkv = unit % a.Hkv;
    int64_t head = a.table_heads == 1 ? 0 : a.table_heads == a.H ? hkv * nz + z : hkv;
    return a.table + (((a.table_batch == 1 ? 0 : b) * a.table_heads + head) * a.NQ + row) * a.K;
  }
  int64_t first_head(int64_t unit, int64_t z) const { return unit % a.Hkv * (a.H / a.Hkv) + z; }  // G of them, in order
  int64_t heads() const { return a.H / a.Hkv; }
  uint64_t hash_of_key(int64_t key) const { return key_hash((uint64_t)(a.key_ids ? a.key_ids[key] : key)); }
  int64_t offset_k(int64_t unit, int64_t key) const {
    return unit / a.Hkv * a.sk[0] + unit % a.Hkv * a.sk[1] + key * a.sk[2];
  }
  int64_t offset_v(int64_t unit, int64_t key) const {
    return unit / a.Hkv * a.sv[0] + unit % a.Hkv * a.sv[1] + key * a.sv[2];
  }

  // ---- once per call: keys and values in the forms the products want, bounds of the mask, hashes -------------------

  void pack_block(int64_t unit, int64_t block, Scratch &s) {
    int64_t first = block * a.kv_block, count = std::min(a.kv_block, a.Nkv - first);
    for (int64_t p = 0; p < kbp / 16; p++) {
      int64_t at = (unit * panels + block * (kbp / 16) + p) * 16 * Dp;
      for (int which = 0; which < (backward ? 2 : 1); which++) {
        if (direct && p * 16 + 16 <= count) {
          int64_t key = first + p * 16, stride = which ? a.sv[2] : a.sk[2];
          const float *rows = (const float *)(which ? a.v : a.k) + (which ? offset_v(unit, key) : offset_k(unit, key));
          transpose_panel(rows, stride, Dp, (which ? vt : kt) + at);
          continue;
        }
        for (int64_t j = 0; j < 16; j++) {
          int64_t key = first + p * 16 + j;
          if (p * 16 + j >= count)
            std::memset(s.rows16 + j * Dp, 0, Dp * 4);
          else if (which)
            read_row(a.bf16, a.v, offset_v(unit, key), a.D, Dp, 1.f, s.rows16 + j * Dp);
          else
            read_row(a.bf16, a.k, offset_k(unit, key), a.D, Dp, 1.f, s.rows16 + j * Dp);
        }
        transpose_panel(s.rows16, Dp, Dp, (which ? vt : kt) + at);
      }
    }
    for (int64_t i = 0; i < count; i++) {
      int64_t to = (unit * a.Nkv + first + i) * Dp;
#if defined(__AVX512FP16__)
      if (half) {
        read_row(true, backward ? a.k : a.v, backward ? offset_k(unit, first + i) : offset_v(unit, first + i), a.D, Dp,
                 1.f, s.rows16);
        halves_of(s.rows16, Dp, unit_scale[unit], (backward ? kh : vh) + to);
      }
#endif
      if (kn) read_row(a.bf16, a.k, offset_k(unit, first + i), a.D, Dp, 1.f, kn + to);
      if (vn) read_row(a.bf16, a.v, offset_v(unit, first + i), a.D, Dp, 1.f, vn + to);
    }
  }

  bool half_of(int64_t unit) const { return half && unit_scale[unit] > 0.f; }

  // The scale of a unit's keys (backward) or values (forward) in fp16.
  void measure_unit(int64_t unit, Scratch &s) {
    Magnitudes of_rows;
    for (int64_t key = 0; key < a.Nkv; key++) {
      if (backward)
        read_row(true, a.k, offset_k(unit, key), a.D, Dp, 1.f, s.rows16);
      else
        read_row(true, a.v, offset_v(unit, key), a.D, Dp, 1.f, s.rows16);
      of_rows.add(largest_magnitude(s.rows16, Dp));
    }
    unit_scale[unit] = of_rows.wide() ? 0.f : scale_to_one(of_rows.most);
  }

  Bounds bounds_of(const int32_t *from, const int32_t *until, const int32_t *doc, int64_t n) const {
    Bounds r;
    r.none();
    for (int64_t i = 0; i < n; i++) {
      r.from_min = std::min(r.from_min, from[i]), r.from_max = std::max(r.from_max, from[i]);
      r.until_min = std::min(r.until_min, until[i]), r.until_max = std::max(r.until_max, until[i]);
    }
    if (doc)
      for (int64_t i = 0; i < n; i++) r.doc_min = std::min(r.doc_min, doc[i]), r.doc_max = std::max(r.doc_max, doc[i]);
    return r;
  }

  void prepare(Team &team) {
    std::atomic<int64_t> next{0}, next_unit{0};
    if (half)
      team.run([&](int me) {
        for (int64_t unit; (unit = next_unit++) < units;) measure_unit(unit, scratch[me]);
      });
    const int64_t at_once = std::max((int64_t)1, 256 / kbp), per_unit = (NB + at_once - 1) / at_once;
    team.run([&](int me) {
      if (me == 0) {
        if (hashes)
          for (int64_t key = 0; key < a.Nkv; key++) hashes[key] = hash_of_key(key);
        if (!gather)
          for (int64_t b = 0; b < mask_batch; b++)
            for (int64_t block = 0; block < NB; block++)
              for (int64_t p = 0; p < kbp / 16; p++) {
                int64_t key = block * a.kv_block + p * 16;
                int64_t stop = std::min({key + 16, (block + 1) * a.kv_block, a.Nkv});
                bounds[b * panels + block * (kbp / 16) + p] =
                    bounds_of(a.from + b * a.from_b + key, a.until + b * a.until_b + key,
                              a.kv_doc ? a.kv_doc + b * a.kv_doc_b + key : nullptr, std::max(stop - key, (int64_t)0));
              }
      }
      if (gather) return;
      for (int64_t i; (i = next++) < units * per_unit;) {
        int64_t block = i % per_unit * at_once;
        for (int64_t stop = std::min(block + at_once, NB); block < stop; block++)
          pack_block(i / per_unit, block, scratch[me]);
      }
    });
  }

  // Of one row: the gradient of its output, its lse (+inf where it reads nothing: P = exp(S − inf) = 0) and delta.
  void read_gradient(int64_t b, int64_t h, int64_t i, float *dout, float *out, float &lse, float &delta) const {
    int64_t at = (b * a.H + h) * a.Nq + i;
    read_row(a.bf16, a.dout, b * a.sdo[0] + h * a.sdo[1] + i * a.sdo[2], a.D, Dp, 1.f, dout);
    read_row(a.bf16, a.out_saved, at * a.D, a.D, Dp, 1.f, out);
    vf sum = vf{};
    for (int64_t d = 0; d < Dp; d += W) sum += load(dout + d) * load(out + d);
    const bool empty = a.lse[at] == -INF;
    lse = empty ? INF : a.lse[at];
    delta = empty ? 0.f : sum_of(sum) - (a.dlse ? a.dlse[at] : 0.f);
  }

  void write_out(int64_t unit, int64_t to, float m, float l, const float *sums) const {
    bool empty = m == -INF;
    if (half_of(unit)) l /= weight_scale;
    write_row(a.bf16, a.out, to * a.D, a.D, empty ? 0.f : 1.f / l, sums);
    a.lse[to] = empty ? -INF : m + std::log(l);
  }

  int64_t keys_of_row(const int32_t *entries, int64_t row) const {
    if (a.dense_row[row]) return a.Nkv;
    int64_t count = 0;
    for (int64_t e = 0; e < a.K; e++) count += entries[e] >= 0;
    return count * a.kv_block;
  }
};

// The keys of one row of a table, a chunk at a time.
struct Chunks {
  const Call &call;
  Scratch &s;
  int64_t unit, b;
  const int32_t *entries;
  int64_t count;  // of entries
  bool dense;
  float *dk, *dv;                  // of the unit: [Nkv][Dp]
  int64_t entry = -1, block = -1;  // where the walk stands
  int64_t offset = 0, left = 0;
  int segments = 0;
  Segment segment[CHUNK / 16];
  Span span[CHUNK];
  int spans = 0;

  Chunks(const Call &call_, Scratch &s_, int64_t unit_, const int32_t *entries_, int64_t count_, bool dense_,
         float *dk_, float *dv_)
      : call(call_), s(s_), unit(unit_), b(unit_ / call_.a.Hkv), entries(entries_), count(count_), dense(dense_),
        dk(dk_), dv(dv_) {}

  bool more() {  // whether there are keys left; moves on to the next block when one is done
    const Args &a = call.a;
    while (left == 0) {
      if (dense) {
        if (++block >= call.NB) return false;
      } else {
        if (++entry >= count) return false;
        block = entries[entry];
        if (block < 0) continue;
      }
      offset = 0;
      left = std::min(a.kv_block, a.Nkv - block * a.kv_block);
    }
    return true;
  }

  bool next() {
    segments = spans = 0;
    int columns = 0;
    while (columns < CHUNK && more()) {
      if (call.gather) {
        columns = SEGMENT * (segments + 1);
        gather_segment();
      } else {
        int n = (int)std::min(left, (int64_t)SEGMENT), np = (n + 15) / 16 * 16;
        if (columns + np > CHUNK) break;
        add_packed(n, np);
        columns += np;
        offset += n, left -= n;
      }
    }
    return segments > 0;
  }

  void add_span(Segment &of, int column, int count) {
    span[spans++] = Span{dense ? -1 : (int)entry, column, count};
    of.spans++;
  }

  void add_packed(int n, int np) {
    const Args &a = call.a;
    int64_t key = block * a.kv_block + offset, panel = (block * call.kbp + offset) / 16;
    const Bounds *bounds = call.bounds + (call.mask_batch == 1 ? 0 : b) * call.panels + panel;
    Segment *last = segments ? &segment[segments - 1] : nullptr;
    if (last && last->n == last->np && last->panel + last->np / 16 == panel && last->key + last->n == key &&
        last->np + np <= SEGMENT) {
      add_span(*last, last->np, n);
      last->n += n, last->np += np;
      for (int p = 0; p < np / 16; p++) last->bounds.add(bounds[p]);
      return;
    }
    Segment &x = segment[segments++];
    x.n = n, x.np = np, x.panel = (int)panel, x.spans = 0, x.first_span = spans, x.key = key;
    add_span(x, 0, n);
    int64_t at = (unit * call.panels + panel) * 16 * call.Dp, row = (unit * a.Nkv + key) * call.Dp;
    x.kt = call.kt + at;
    x.vt = call.backward ? call.vt + at : nullptr;
    x.kh = call.kh ? call.kh + row : nullptr, x.vh = call.vh ? call.vh + row : nullptr;
    x.kn = call.kn ? call.kn + row : call.direct ? (const float *)a.k + call.offset_k(unit, key) : nullptr;
    x.vn = call.vn ? call.vn + row : call.direct ? (const float *)a.v + call.offset_v(unit, key) : nullptr;
    x.from = a.from + b * a.from_b + key, x.until = a.until + b * a.until_b + key;
    x.doc = a.kv_doc ? a.kv_doc + b * a.kv_doc_b + key : nullptr;
    x.hashes = call.hashes ? call.hashes + key : nullptr;
    x.dk = call.backward ? dk + key * call.Dp : nullptr, x.dv = call.backward ? dv + key * call.Dp : nullptr;
    x.bounds.none();
    for (int p = 0; p < np / 16; p++) x.bounds.add(bounds[p]);
  }

  void gather_segment() {  // up to SEGMENT keys of any blocks
    const Args &a = call.a;
    const int64_t Dp = call.Dp, first = segments * SEGMENT;
    Segment &x = segment[segments++];
    x.n = x.spans = 0, x.first_span = spans, x.panel = -1, x.key = -1;
    while (x.n < SEGMENT && more()) {
      int n = (int)std::min(left, (int64_t)(SEGMENT - x.n));
      add_span(x, x.n, n);
      for (int i = 0; i < n; i++) {
        int64_t key = block * a.kv_block + offset + i, at = first + x.n + i;
        s.ids[at] = key;
        read_row(a.bf16, a.k, call.offset_k(unit, key), a.D, Dp, 1.f, s.kn + at * Dp);
        read_row(a.bf16, a.v, call.offset_v(unit, key), a.D, Dp, 1.f, s.vn + at * Dp);
        s.from[at] = a.from[b * a.from_b + key], s.until[at] = a.until[b * a.until_b + key];
        if (a.kv_doc) s.kv_doc[at] = a.kv_doc[b * a.kv_doc_b + key];
        if (call.hashes) s.hashes[at] = call.hashes[key];
      }
      x.n += n, offset += n, left -= n;
    }
    x.np = (x.n + 15) / 16 * 16;
    std::memset(s.kn + (first + x.n) * Dp, 0, (x.np - x.n) * Dp * 4);
    std::memset(s.vn + (first + x.n) * Dp, 0, (x.np - x.n) * Dp * 4);
    for (int p = 0; p < x.np; p += 16) {
      transpose_panel(s.kn + (first + p) * Dp, Dp, Dp, s.kt + (first + p) * Dp);
      if (call.backward) transpose_panel(s.vn + (first + p) * Dp, Dp, Dp, s.vt + (first + p) * Dp);
    }
    x.kt = s.kt + first * Dp, x.vt = s.vt + first * Dp, x.kn = s.kn + first * Dp, x.vn = s.vn + first * Dp;
    x.from = s.from + first, x.until = s.until + first, x.doc = a.kv_doc ? s.kv_doc + first : nullptr;
    x.hashes = s.hashes + first;
    x.bounds = call.bounds_of(x.from, x.until, x.doc, x.n);
    x.dk = s.dk + first * Dp, x.dv = s.dv + first * Dp;
    if (call.backward) {
      std::memset(x.dk, 0, x.np * Dp * 4);
      std::memset(x.dv, 0, x.np * Dp * 4);
    }
  }

  void scatter() {  // gradients of gathered keys to where they belong
    if (!call.gather) return;
    const int64_t Dp = call.Dp;
    for (int i = 0; i < segments; i++)
      for (int c = 0; c < segment[i].n; c++) {
        float *to_k = dk + s.ids[i * SEGMENT + c] * Dp, *to_v = dv + s.ids[i * SEGMENT + c] * Dp;
        for (int64_t d = 0; d < Dp; d++) to_k[d] += segment[i].dk[c * Dp + d], to_v[d] += segment[i].dv[c * Dp + d];
      }
  }
};

// Some rows of a table's row, for the G query heads that read the same keys: row m = g · R + i is query first + i.
// Or rows of a portion that begins with query `first`, as their picks say.
struct Item {
  Call &call;
  Scratch &s;
  int64_t unit, z, row, first, R, M, b;
  bool half;                            // products with weights and their gradients are fp16
  float weight_scale = 1.f, weight_log = 0.f;
  const Pick *picks = nullptr;
  Live live[CHUNK / 16];
  int lives = 0, width = 0;
  int begin[ROWS / GROUP], end[ROWS / GROUP];  // the columns that each group of rows computes; others hold anything

  Item(Call &call_, Scratch &s_, int64_t unit_, int64_t z_, int64_t row_, int64_t first_, int64_t R_)
      : call(call_), s(s_), unit(unit_), z(z_), row(row_), first(first_), R(R_), M(call_.G * R_),
        b(unit_ / call_.a.Hkv), half(call_.half_of(unit_)) {
    read();
  }
  Item(Call &call_, Scratch &s_, int64_t unit_, int64_t first_, const Pick *picks_, int64_t M_)
      : call(call_), s(s_), unit(unit_), z(0), row(0), first(first_), R(1), M(M_), b(unit_ / call_.a.Hkv),
        half(call_.half_of(unit_)), picks(picks_) {
    read();
  }

  void read() {
    const Args &a = call.a;
    std::fill(s.reach, s.reach + (M + GROUP - 1) / GROUP, Reach{});
    for (int64_t m = 0; m < M; m++) {
      int64_t i = query(m), h = head(m);
      read_row(a.bf16, a.q, b * a.sq[0] + h * a.sq[1] + i * a.sq[2], a.D, call.Dp, (float)a.scale, s.q + m * call.Dp);
      s.pos[m] = a.q_pos[b * a.q_pos_b + i];
      s.doc[m] = a.q_doc ? a.q_doc[b * a.q_doc_b + i] : 0;
      s.reach[m / GROUP].add(Reach{s.pos[m], s.pos[m], s.doc[m], s.doc[m]});
      if (a.drop_keys)
        s.hash[m] = chained(chained((uint64_t)a.drop_keys[b], (uint64_t)h), (uint64_t)(int64_t)s.pos[m]);
    }
    use_half(half);
  }
  void use_half(bool use) {
    half = use, weight_scale = use ? call.weight_scale : 1.f, weight_log = use ? call.weight_log : 0.f;
  }
  int64_t head(int64_t m) const {
    return picks ? call.first_head(unit, 0) + picks[m].row % call.heads() : call.first_head(unit, z) + m / R;
  }
  int64_t query(int64_t m) const { return first + (picks ? picks[m].row / call.heads() : m % R); }
  int64_t index(int64_t m) const { return (b * call.a.H + head(m)) * call.a.Nq + query(m); }  // into [B, H, Nq]

  // Scores of rows m0 … m0 + rows − 1 against what they see of a chunk, −inf where they may not read. False: nothing.
  bool scores(const Chunks &chunk, int64_t m0, int rows) {
    const Args &a = call.a;
    const int groups = (rows + GROUP - 1) / GROUP;
    const Reach *of_group = s.reach + m0 / GROUP;
    Reach all_rows;
    for (int g = 0; g < groups; g++) all_rows.add(of_group[g]);
    const bool docs = a.q_doc && a.kv_doc;
    bool any_masked = false;
    lives = width = 0;
    for (int i = 0; i < chunk.segments; i++) {
      const Segment &x = chunk.segment[i];
      const Bounds &of = x.bounds;
      if (all_rows.misses(of, docs)) continue;
      bool full = of.from_max <= all_rows.pos_min && of.until_min > all_rows.pos_max;
      if (docs) full = full && of.doc_min == of.doc_max && all_rows.doc_min == all_rows.doc_max;  // and so are equal
      live[lives++] = Live{&x, width, !full};
      any_masked |= !full;
      width += x.np;
    }
    std::fill(begin, begin + groups, 0);
    std::fill(end, end + groups, width);
    if (any_masked && !call.gather) narrow(of_group, groups, docs);
    const float *q = s.q + m0 * call.Dp;
    for (int i = 0; i < lives; i++) {
      const Segment &x = *live[i].of;
      float *to = s.s + live[i].column;
      const void *next = i + 1 < lives ? live[i + 1].of->kt : call.backward ? live[0].of->vt : live[0].of->vn;
      if (!next) next = live[0].of->vh;
      by_rows(rows, live[i].column, x.np, [&](int r, int count, int c, int n) {
        product<false>(count, n / 16, a.D, q + r * call.Dp, call.Dp, x.kt + c * call.Dp, 16, 16 * call.Dp,
                       to + r * STRIDE + c, STRIDE, false, next);
      });
      if (a.bias) add_bias(chunk, x, m0, rows, to);
      if (live[i].masked)
        by_rows(rows, live[i].column, x.n, [&](int r, int count, int c, int n) {
          hide(x, m0 + r, count, to + r * STRIDE, c, c + n, docs);
        });
      if (x.n < x.np)
        for (int r = 0; r < rows; r++) std::fill(to + r * STRIDE + x.n, to + r * STRIDE + x.np, -INF);
    }
    return lives > 0;
  }

  // Leaves out the panels before the first and after the last one that any row of a group may see.
  void narrow(const Reach *of_group, int groups, bool docs) {
    const Bounds *bounds = call.bounds + (call.mask_batch == 1 ? 0 : b) * call.panels;
    for (int g = 0; g < groups; g++) {
      begin[g] = width, end[g] = 0;
      for (int i = 0; i < lives; i++)
        for (int p = 0; p < live[i].of->np / 16; p++)
          if (!live[i].masked || !of_group[g].misses(bounds[live[i].of->panel + p], docs))
            widen(g, live[i].column + p * 16);
    }
    for (bool again = true; again;) {  // until the groups that compute a panel follow one another
      again = false;
      for (int c = 0; c < width; c += 16) {
        const auto [first, last] = groups_at(groups, c);
        for (int g = first; g < last; g++)
          if (c < begin[g] || c >= end[g]) widen(g, c), again = true;
      }
    }
  }
  void widen(int g, int column) { begin[g] = std::min(begin[g], column), end[g] = std::max(end[g], column + 16); }

  // The groups from the first to the last that compute a column; none: equal numbers.
  std::pair<int, int> groups_at(int groups, int column) const {
    int first = 0, last = groups;
    while (first < last && (column < begin[first] || column >= end[first])) first++;
    while (last > first && (column < begin[last - 1] || column >= end[last - 1])) last--;
    return {first, last};
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
      const auto [first, last] = groups_at(groups, column + c);
      for (stop = c + 16; stop < n && groups_at(groups, column + stop) == std::make_pair(first, last);) stop += 16;
      stop = std::min(stop, n);
      const int r = first * GROUP;
      if (first < last) use(r, std::min(last * GROUP, rows) - r, c, stop - c);
    }
  }

  void hide(const Segment &x, int64_t m0, int rows, float *to, int first, int stop, bool docs) const {
    const int32_t *from = x.from, *until = x.until, *doc = x.doc;
    for (int r = 0; r < rows; r++, to += STRIDE) {
      const int32_t pos = s.pos[m0 + r], of = s.doc[m0 + r];
      for (int c = first; c < stop; c++) to[c] = (from[c] <= pos) & (pos < until[c]) ? to[c] : -INF;
      if (docs)
        for (int c = first; c < stop; c++) to[c] = doc[c] == of ? to[c] : -INF;
    }
  }

  void add_bias(const Chunks &chunk, const Segment &x, int64_t m0, int rows, float *to) const {
    const Args &a = call.a;
    for (int r = 0; r < rows; r++, to += STRIDE) {
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

  // Segments whose keys follow one another in memory, as one: use(column, first segment, keys).
  template <class Use>
  void runs(Use use) const {
    for (int i = 0; i < lives;) {
      const Segment &x = *live[i].of;
      int n = x.n, stop = i + 1;
      while (stop < lives && x.key >= 0 && live[stop - 1].of->n == live[stop - 1].of->np &&
             live[stop].of->key == x.key + n)
        n += live[stop++].of->n;
      use(live[i].column, x, n);
      i = stop;
    }
  }

  // Rows of some keys, or of their values, in fp32.
  const float *rows_of(const Segment &x, int n, bool keys) const {
    const Args &a = call.a;
    if (!call.half) return keys ? x.kn : x.vn;
    for (int c = 0; c < n; c++)
      read_row(true, keys ? a.k : a.v, keys ? call.offset_k(unit, x.key + c) : call.offset_v(unit, x.key + c), a.D,
               call.Dp, 1.f, s.rows + c * call.Dp);
    return s.rows;
  }

  void keep_row(int64_t m, float *to) const {
    for (int i = 0; i < lives; i++)
      keep_factors(s.hash[m], live[i].of->hashes, live[i].of->n, live[i].of->np, (uint64_t)call.a.drop_below,
                   (float)call.a.keep, to + live[i].column);
  }

  // ---- forward -------------------------------------------------------------------------------------------------

  void forward(Chunks &chunks) {
    const int64_t Dp = call.Dp;
    std::fill(s.m, s.m + M, -INF);
    std::fill(s.l, s.l + M * W, 0.f);
    std::memset(s.sums, 0, M * Dp * 4);
    read_keys(chunks);
    for (int64_t m = 0; m < M; m++) call.write_out(unit, index(m), s.m[m], sum_of(load(s.l + m * W)), s.sums + m * Dp);
  }

  void read_keys(Chunks &chunks) {
    const int64_t Dp = call.Dp;
    while (chunks.next())
      for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
        int rows = (int)std::min((int64_t)ROWS, M - m0);
        if (!scores(chunks, m0, rows)) continue;
        for (int r = 0; r < rows; r++) {
          const int from = begin[r / GROUP], to = end[r / GROUP];
          if (from < to) online_softmax(m0 + r, s.s + r * STRIDE + from, from, to - from);
        }
        runs([&](int column, const Segment &x, int n) {
          const void *next = x.kt + n * Dp;
          const float *values = half ? nullptr : rows_of(x, n, false);
          by_rows(rows, column, n, [&](int r, int count, int c, int keys) {
            const float *p = s.s + r * STRIDE + column + c;
            float *to = s.sums + (m0 + r) * Dp;
#if defined(__AVX512FP16__)
            if (half) {
              const float factor = unscaled(weight_scale, call.unit_scale[unit]);
              return half_product<false>(count, Dp, keys, p, x.vh + c * Dp, factor, to, next);
            }
#endif
            product<false>(count, (int)(Dp / 16), keys, p, STRIDE, values + c * call.vn_stride, call.vn_stride, 16, to,
                           Dp, true, next);
          });
        });
      }
  }

  // p: `width` scores from column `first` on → weights relative to exp(s.m). Where a row's maximum grows by little, s.m
  // stays as it is: weights up to exp(SLACK) are as exact as those up to 1, and what has been summed need not be scaled
  // anew.
  void online_softmax(int64_t m, float *p, int first, int width) {
    vf most = load(p);
    for (int c = W; c < width; c += W) most = larger(most, load(p + c));
    float now = s.m[m];
    if (now == -INF || any_above(most, now + SLACK)) {
      const float before = now;
      now = std::max(before, largest_of(most));
      if (now == -INF) {  // nothing read yet: exp(−inf − −inf) is no number
        if (std::none_of(p, p + width, [](float x) { return x != x; })) {
          std::fill(p, p + width, 0.f);
          return;
        }
        now = 0.f;  // scores that are no number stay so: an error upstream must show
      }
      if (now != before) {
        const float factor = exp_of(all(before - now))[0];
        float *of = s.sums + m * call.Dp;
        for (int64_t d = 0; d < call.Dp; d += W) store(of + d, load(of + d) * factor);
        store(s.l + m * W, load(s.l + m * W) * factor);
        s.m[m] = now;
      }
    }
    if (call.a.drop_keys) keep_row(m, s.keep);
    with_constants([&](auto halves, auto drop) {
      vf sum = load(s.l + m * W);
      const float shift = now - weight_log, *keep = s.keep + first;
      for (int c = 0, n = width; c < n; c += W) {
        vf x = exp_less<halves>(load(p + c), shift);
        sum += x;
        if constexpr (drop) x *= load(keep + c);
        put<halves>(p + c, x);
      }
      store(s.l + m * W, sum);
    });
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

  // ---- backward ------------------------------------------------------------------------------------------------

  void backward(Chunks &chunks) {
    const Args &a = call.a;
    const int64_t Dp = call.Dp;
    for (int64_t m = 0; m < M; m++)  // dq is not in use yet: there is room for the output
      call.read_gradient(b, head(m), first + m % R, s.dout + m * Dp, s.dq + m * Dp, s.m[m], s.delta[m]);
    std::memset(s.dq, 0, M * Dp * 4);
    add_gradients(chunks);
    for (int64_t m = 0; m < M; m++)
      write_row(a.bf16, a.dq, index(m) * a.D, a.D, (float)a.scale, s.dq + m * Dp);
  }

  void add_gradients(Chunks &chunks) {
    const Args &a = call.a;
    const int64_t Dp = call.Dp;
    [[maybe_unused]] float q_scale = 1.f, dout_scale = 1.f;
    float ds_scale = 1.f;
#if defined(__AVX512FP16__)
    Magnitudes of_q, of_dout;
    for (int64_t m = 0; half && m < M; m++) {
      of_q.add(largest_magnitude(s.q + m * Dp, Dp));
      of_dout.add(largest_magnitude(s.dout + m * Dp, Dp));
    }
    use_half(half && !of_q.wide() && !of_dout.wide());
    if (half) {
      q_scale = scale_to_one(of_q.most), dout_scale = scale_to_one(of_dout.most);
      halves_of(s.q, M * Dp, q_scale, s.q_half);
      halves_of(s.dout, M * Dp, dout_scale, s.dout_half);
    }
#endif
    while (chunks.next()) {
      for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
        int rows = (int)std::min((int64_t)ROWS, M - m0);
        if (!scores(chunks, m0, rows)) continue;
        for (int i = 0; i < lives; i++)
          by_rows(rows, live[i].column, live[i].of->np, [&](int r, int count, int c, int n) {
            product<false>(count, n / 16, a.D, s.dout + (m0 + r) * Dp, Dp, live[i].of->vt + c * Dp, 16, 16 * Dp,
                           s.dp + r * STRIDE + live[i].column + c, STRIDE, false,
                           i + 1 < lives ? live[i + 1].of->vt : live[0].of->dv);
          });
        const bool half_rows = half;
        if (half) {
          const Magnitudes of_rows = largest_gradients(m0, rows);
          use_half(!of_rows.wide());
          ds_scale = half ? 512.f * scale_to_one(of_rows.most) : 1.f;
        }
        softmax_gradients(m0, rows, ds_scale, a.dbias);
        if (a.dbias) {
          add_bias_gradient(chunks, m0, rows);
          if (half)
            for (int r = 0; r < rows; r++)
              for (int c = begin[r / GROUP]; c < end[r / GROUP]; c += W)
                put<true>(s.dp + r * STRIDE + c, load(s.dp + r * STRIDE + c) * ds_scale);
        }
        const int panels = (int)(Dp / 16);
        runs([&](int column, const Segment &x, int n) {
          const void *next = x.kt + n * Dp;
          const float *keys_of_run = half ? nullptr : rows_of(x, n, true);
          auto to_keys = [&](const float *of_tile, auto use) {
            by_columns(rows, column, n, [&](int r, int count, int c, int keys) {
              use(of_tile + r * STRIDE + column + c, (m0 + r) * Dp, count, c * Dp, keys);
            });
          };
#if defined(__AVX512FP16__)
          if (half) {
            to_keys(s.s, [&](const float *p, int64_t row, int count, int64_t key, int keys) {
              half_product<true>(keys, Dp, count, p, s.dout_half + row, unscaled(weight_scale, dout_scale), x.dv + key,
                                 x.dk);
            });
            to_keys(s.dp, [&](const float *ds, int64_t row, int count, int64_t key, int keys) {
              half_product<true>(keys, Dp, count, ds, s.q_half + row, unscaled(ds_scale, q_scale), x.dk + key, x.kh);
            });
            by_rows(rows, column, n, [&](int r, int count, int c, int keys) {
              half_product<false>(count, Dp, keys, s.dp + r * STRIDE + column + c, x.kh + c * Dp,
                                  unscaled(ds_scale, call.unit_scale[unit]), s.dq + (m0 + r) * Dp, next);
            });
            return;
          }
#endif
          to_keys(s.s, [&](const float *p, int64_t row, int count, int64_t key, int keys) {
            product<true>(keys, panels, count, p, STRIDE, s.dout + row, Dp, 16, x.dv + key, Dp, true, x.dk);
          });
          to_keys(s.dp, [&](const float *ds, int64_t row, int count, int64_t key, int keys) {
            product<true>(keys, panels, count, ds, STRIDE, s.q + row, Dp, 16, x.dk + key, Dp, true, x.kn);
          });
          by_rows(rows, column, n, [&](int r, int count, int c, int keys) {
            product<false>(count, panels, keys, s.dp + r * STRIDE + column + c, STRIDE,
                           keys_of_run + c * call.kn_stride, call.kn_stride, 16, s.dq + (m0 + r) * Dp, Dp, true, next);
          });
        });
        use_half(half_rows);
      }
      chunks.scatter();
    }
  }

  // What the gradients of the scores of each row of a tile can be, at most.
  Magnitudes largest_gradients(int64_t m0, int rows) const {
    const float keep = call.a.drop_keys ? (float)call.a.keep : 1.f;
    Magnitudes found;
    for (int r = 0; r < rows; r++) {
      const float *dp = s.dp + r * STRIDE, *score = s.s + r * STRIDE;
      vf most = vf{};
      for (int c = begin[r / GROUP]; c < end[r / GROUP]; c += W)
        most = larger_magnitude(most, load(dp + c), load(score + c));
      const float of_row = largest_of(most);
      if (of_row > 0.f) found.add(of_row * keep + std::abs(s.delta[m0 + r]));
    }
    return found;
  }

  // Scores → weights (after dropout), dp → gradient of the scores, for the products; fp32 where `plain`.
  void softmax_gradients(int64_t m0, int rows, float ds_scale, bool plain) {
    const float scale = (plain ? 1.f : ds_scale) / weight_scale, *keep = s.keep;
    with_constants([&](auto halves, auto drop) {
      auto each = [&](auto is_plain) {
        for (int r = 0; r < rows; r++) {
          if constexpr (drop) keep_row(m0 + r, s.keep);
          float *p = s.s + r * STRIDE, *dp = s.dp + r * STRIDE;
          const float lse = s.m[m0 + r] - weight_log, delta = s.delta[m0 + r] * scale;
          for (int c = begin[r / GROUP], n = end[r / GROUP]; c < n; c += W) {
            const vf x = exp_less<halves>(load(p + c), lse);
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

  void add_bias_gradient(const Chunks &chunk, int64_t m0, int rows) const {
    const Args &a = call.a;
    for (int i = 0; i < lives; i++)
      for (int r = 0; r < rows; r++) {
        float *to = a.dbias + ((b * a.H + head(m0 + r)) * a.NQ + (picks ? query(m0 + r) : row)) * a.K;
        const float *ds = s.dp + r * STRIDE + live[i].column;
        const int first = begin[r / GROUP] - live[i].column, stop = end[r / GROUP] - live[i].column;
        if (picks) {
          for (int c = std::max(first, 0); c < std::min(stop, live[i].of->n); c++) to[picks[m0 + r].entry] += ds[c];
          continue;
        }
        for (int k = live[i].of->first_span; k < live[i].of->first_span + live[i].of->spans; k++) {
          const Span &of = chunk.span[k];
          float sum = 0;
          for (int c = std::max(of.column, first); c < std::min(of.column + of.count, stop); c++) sum += ds[c];
          if (of.entry >= 0) to[of.entry] += sum;
        }
      }
  }
};

void row_of_table(Call &call, Scratch &s, int64_t unit, int64_t z, int64_t row, float *dk, float *dv) {
  const Args &a = call.a;
  const int64_t stop = std::min((row + 1) * a.q_block, a.Nq), at_once = call.item_rows / call.G;
  for (int64_t first = row * a.q_block; first < stop; first += at_once) {
    Item item(call, s, unit, z, row, first, std::min(at_once, stop - first));
    Chunks chunks(call, s, unit, call.table_row(unit, z, row), a.K, a.dense_row[row], dk, dv);
    if (call.backward)
      item.backward(chunks);
    else
      item.forward(chunks);
  }
}

// Queries first … stop − 1 of a unit, by key block: the rows that picked one meet it in tiles, in the order of the
// queries. What a row has summed so far, or its dq, waits in the portion's buffers from one of its blocks to the next.
struct Portion {
  Call &call;
  Scratch &s;
  int64_t unit, first, stop, heads, b;
  float *dk, *dv;

  Portion(Call &call_, Scratch &s_, int64_t unit_, int64_t first_, int64_t stop_, float *dk_, float *dv_)
      : call(call_), s(s_), unit(unit_), first(first_), stop(stop_), heads(call_.heads()), b(unit_ / call_.a.Hkv),
        dk(dk_), dv(dv_) {
    const Args &a = call.a;
    std::fill(s.stop, s.stop + call.NB + 1, 0);
    each_pick([&](int64_t block, int64_t, int64_t) { s.stop[block + 1] += call.G; });
    for (int64_t block = 0; block < call.NB; block++) s.stop[block + 1] += s.stop[block];
    each_pick([&](int64_t block, int64_t row, int64_t entry) {  // moves stop[block] from its first pick behind its last
      for (int64_t g = 0; g < call.G; g++) s.picks[s.stop[block]++] = Pick{(int32_t)(row + g), (int32_t)entry};
    });
    for (int64_t i = first; i < stop; i++)
      if (a.dense_row[i])
        for (int64_t z = 0; z < call.nz; z++) row_of_table(call, s, unit, z, i, dk, dv);
    call.backward ? backward() : forward();
  }

  template <class Use>
  void each_pick(Use use) const {  // use(block, first row that reads it there, entry)
    for (int64_t i = first; i < stop; i++)
      for (int64_t z = 0; z < call.nz; z++) {
        const int32_t *entries = call.table_row(unit, z, i);
        for (int64_t e = 0; e < call.a.K; e++)
          if (entries[e] >= 0) use(entries[e], (i - first) * heads + z, e);
      }
  }

  template <class Use>
  void each_tile(Use use) {  // use(item, chunks of its block)
    for (int32_t block = 0; block < call.NB; block++)
      for (int64_t at = block ? s.stop[block - 1] : 0; at < s.stop[block]; at += ROWS) {
        Item item(call, s, unit, first, s.picks + at, std::min((int64_t)ROWS, s.stop[block] - at));
        Chunks chunks(call, s, unit, &block, 1, false, dk, dv);
        use(item, chunks);
      }
  }

  template <class Use>
  void each_row(Use use) const {  // use(row, head, query); dense rows are done
    for (int64_t i = first; i < stop; i++)
      if (!call.a.dense_row[i])
        for (int64_t h = 0; h < heads; h++) use((i - first) * heads + h, call.first_head(unit, 0) + h, i);
  }

  void forward() {
    const int64_t Dp = call.Dp, rows = (stop - first) * heads;
    std::fill(s.row_m, s.row_m + rows, -INF);
    std::fill(s.row_l, s.row_l + rows, 0.f);
    std::memset(s.row_sums, 0, rows * Dp * 4);
    each_tile([&](Item &item, Chunks &chunks) {
      for (int64_t m = 0; m < item.M; m++) {
        const int64_t row = item.picks[m].row;
        s.m[m] = s.row_m[row], store(s.l + m * W, vf{s.row_l[row]});
        std::memcpy(s.sums + m * Dp, s.row_sums + row * Dp, Dp * 4);
      }
      item.read_keys(chunks);
      for (int64_t m = 0; m < item.M; m++) {
        const int64_t row = item.picks[m].row;
        s.row_m[row] = s.m[m], s.row_l[row] = sum_of(load(s.l + m * W));
        std::memcpy(s.row_sums + row * Dp, s.sums + m * Dp, Dp * 4);
      }
    });
    each_row([&](int64_t row, int64_t h, int64_t i) {
      call.write_out(unit, (b * call.a.H + h) * call.a.Nq + i, s.row_m[row], s.row_l[row], s.row_sums + row * Dp);
    });
  }

  void backward() {
    const Args &a = call.a;
    const int64_t Dp = call.Dp, rows = (stop - first) * heads;
    each_row([&](int64_t row, int64_t h, int64_t i) {
      call.read_gradient(b, h, i, s.row_dout + row * Dp, s.rows16, s.row_m[row], s.row_delta[row]);
    });
    std::memset(s.row_sums, 0, rows * Dp * 4);
    each_tile([&](Item &item, Chunks &chunks) {
      for (int64_t m = 0; m < item.M; m++) {
        const int64_t row = item.picks[m].row;
        s.m[m] = s.row_m[row], s.delta[m] = s.row_delta[row];
        std::memcpy(s.dout + m * Dp, s.row_dout + row * Dp, Dp * 4);
        std::memcpy(s.dq + m * Dp, s.row_sums + row * Dp, Dp * 4);
      }
      item.add_gradients(chunks);
      for (int64_t m = 0; m < item.M; m++)
        std::memcpy(s.row_sums + item.picks[m].row * Dp, s.dq + m * Dp, Dp * 4);
    });
    each_row([&](int64_t row, int64_t h, int64_t i) {
      write_row(a.bf16, a.dq, ((b * a.H + h) * a.Nq + i) * a.D, a.D, (float)a.scale, s.row_sums + row * Dp);
    });
  }
};

void portions(Call &call, Scratch &s, int64_t unit, int64_t first, int64_t stop, float *dk, float *dv) {
  for (; first < stop; first += call.portion)
    Portion(call, s, unit, first, std::min(first + call.portion, stop), dk, dv);
}

// Asks for large pages: fewer faults where memory is new, and walks over many arrays at once miss the TLB less.
void large_pages(const void *at, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 21, from = (uintptr_t)at;
  const uintptr_t first = (from + page - 1) / page * page, stop = (from + bytes) / page * page;
  if (first < stop) madvise((void *)first, stop - first, MADV_HUGEPAGE);  // a wish: refusal changes nothing
#endif
}

void forward(Call &call) {
  const Args &a = call.a;
  large_pages(a.work, call.bytes);
  Team team(call.threads);
  call.prepare(team);
  std::atomic<int64_t> next{0};
  if (call.by_block) {
    const int64_t per_unit = (call.a.Nq + call.portion - 1) / call.portion;
    team.run([&](int me) {
      for (int64_t i; (i = next++) < call.units * per_unit;) {
        int64_t first = i % per_unit * call.portion;
        const int64_t stop = std::min(first + call.portion, call.a.Nq);
        portions(call, call.scratch[me], i / per_unit, first, stop, nullptr, nullptr);
      }
    });
    return;
  }
  const int64_t NQ = call.a.NQ, rows = call.units * call.nz * NQ;
  team.run([&](int me) {
    for (int64_t i; (i = next++) < rows;)
      row_of_table(call, call.scratch[me], i / (NQ * call.nz), i / NQ % call.nz, i % NQ, nullptr, nullptr);
  });
}

// Rows are dealt out in contiguous shares of equal cost. Where a share begins inside a unit, its gradients of keys and
// values go to a slab of their own, added to the unit's in the order of the shares: no race, the same bits every time.
void backward(Call &call) {
  const Args &a = call.a;
  large_pages(a.work, call.bytes);
  Team team(call.threads);
  const int shares = team.size();
  call.prepare(team);
  const int64_t NQ = a.NQ, tables = call.by_block ? 1 : call.nz;  // by block a query's rows are walked together
  const int64_t per_unit = tables * NQ, rows = call.units * per_unit;
  std::vector<double> cost(rows + 1, 0.0);
  for (int64_t i = 0; i < rows; i++) {
    int64_t unit = i / per_unit, z = i / NQ % tables, row = i % NQ;
    int64_t queries = std::min(a.q_block, a.Nq - row * a.q_block) * call.G;
    cost[i + 1] = cost[i] + (double)(call.keys_of_row(call.table_row(unit, z, row), row) + 1) * (queries + 8);
  }
  std::vector<int64_t> cut(shares + 1, rows);
  for (int t = 0; t < shares; t++)
    cut[t] = std::lower_bound(cost.begin(), cost.end(), cost[rows] * t / shares) - cost.begin();
  const int64_t size = a.Nkv * call.Dp;
  auto slab = [&](int share) { return call.slabs + (share - 1) * 2 * size; };
  team.run([&](int me) {
    float *dk = nullptr, *dv = nullptr;
    for (int64_t i = cut[me]; i < cut[me + 1]; i++) {
      int64_t unit = i / per_unit;
      if (i == cut[me] || i % per_unit == 0) {
        bool own = i % per_unit == 0;
        dk = own ? call.dk + unit * size : slab(me), dv = own ? call.dv + unit * size : slab(me) + size;
        std::memset(dk, 0, size * 4);
        std::memset(dv, 0, size * 4);
      }
      if (call.by_block) {  // all of the share's queries of this unit
        const int64_t stop = std::min(cut[me + 1], (unit + 1) * per_unit);
        portions(call, call.scratch[me], unit, i - unit * per_unit, stop - unit * per_unit, dk, dv);
        i = stop - 1;
      } else {
        row_of_table(call, call.scratch[me], unit, i / NQ % tables, i % NQ, dk, dv);
      }
    }
  });
  std::atomic<int64_t> next{0};
  const int64_t at_once = 256, parts = (a.Nkv + at_once - 1) / at_once;
  team.run([&](int) {
    for (int64_t p; (p = next++) < call.units * parts;) {
      int64_t unit = p / parts, key = p % parts * at_once, stop = std::min(key + at_once, a.Nkv);
      for (int t = 1; t < shares; t++)
        if (cut[t] < cut[t + 1] && cut[t] % per_unit && cut[t] / per_unit == unit)
          for (int which = 0; which < 2; which++) {
            float *to = (which ? call.dv : call.dk) + unit * size;
            const float *add = slab(t) + which * size;
            for (int64_t d = key * call.Dp; d < stop * call.Dp; d++) to[d] += add[d];
          }
      if (!call.direct)
        for (; key < stop; key++) {
          int64_t from = unit * size + key * call.Dp, to = (unit * a.Nkv + key) * a.D;
          write_row(a.bf16, a.dk, to, a.D, 1.f, call.dk + from);
          write_row(a.bf16, a.dv, to, a.D, 1.f, call.dv + from);
        }
    }
  });
}

}  // namespace

extern "C" int64_t native_workspace(const Args *args, int64_t of_backward) {
  return Call(*args, of_backward, nullptr).bytes;
}

// 0, or 1 when memory ran out.
extern "C" int64_t native_run(const Args *args, int64_t of_backward) {
  try {
    Call call(*args, of_backward, (char *)args->work);
    of_backward ? backward(call) : forward(call);
    return 0;
  } catch (const std::bad_alloc &) {
    return 1;
  }
}
