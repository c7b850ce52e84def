// Which weights dropout keeps: the hash of utils/hashing.py and kernels/dropout.py, bit for bit.
#pragma once

#include <cstdint>

namespace {

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
inline uint64_t chained(uint64_t state, uint64_t number) { return mix(state + number * 0x9E3779B97F4A7C15ull + 1); }
inline uint64_t key_hash(uint64_t key) { return mix(key * 0x165667B19E3779F9ull); }

// The factors of n weights of a row: `keep` or 0. Columns n … padded − 1 get 0.
void keep_factors(uint64_t row, const uint64_t *keys, int n, int padded, uint64_t below, float keep, float *to) {
  for (int c = 0; c < n; c++) {
    uint64_t bits = (mix(row ^ keys[c]) >> 20) & 0x7fffffffull;
    to[c] = bits >= below ? keep : 0.f;
  }
  for (int c = n; c < padded; c++) to[c] = 0.f;
}

}  // namespace
