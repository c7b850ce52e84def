// The memory of a call: one buffer, cut into what all threads share and what each has for itself.
#pragma once

#include <cstdint>
#include <cstring>

#include "ranges.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1  // as g++ says it
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

// Hands out pieces of one buffer; without one it only counts their bytes. Under AddressSanitizer a piece ends where it
// ends, as if it had been allocated by itself, and begins as NaN.
class Arena {
 public:
  explicit Arena(void *buffer) : base_((char *)buffer) {}
  Arena(const Arena &) = delete;
#if defined(__SANITIZE_ADDRESS__)
  ~Arena() {
    if (base_) __asan_unpoison_memory_region(base_, used_);
  }
#endif

  int64_t used() const { return used_; }

  template <class T>
  T *take(int64_t count) {
    char *at = base_ ? base_ + used_ : nullptr;
    const int64_t bytes = count * (int64_t)sizeof(T);
    used_ += (bytes + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    used_ += 64;
    if (at) {
      std::memset(at, 0xff, bytes);
      __asan_poison_memory_region(at + bytes, base_ + used_ - (at + bytes));
    }
#endif
    return (T *)at;
  }

 private:
  char *base_;
  int64_t used_ = 0;
};

struct Pick {  // one entry of the table, for one query head
  int32_t row, entry;  // row of the portion: (query − its first) · heads + head
};

struct Scratch {  // of one thread
  float *q, *dout, *sums, *dq;         // [rows at once][Dp]; sums: out
  float *m, *l, *delta;                // [rows at once], l [rows at once][W]; in the backward m + l[row] is the lse
  int32_t *pos, *doc;                  // [rows at once]
  RowRange *range;                     // [rows at once / GROUP]
  uint64_t *hash;                      // [rows at once]
  float *s, *dp, *keep;                // [TILE_ROWS][TILE_STRIDE], [TILE_ROWS][TILE_STRIDE], [CHUNK]
  float *kt, *vt, *kn, *vn, *dk, *dv;  // [CHUNK][Dp]: gathered
  int32_t *from, *until, *kv_doc;      // [CHUNK]
  int64_t *ids;
  uint64_t *hashes;
  float *rows16;                       // [16][Dp]
  float *rows;                         // [CHUNK][Dp]: keys or values of a unit whose products stay fp32
  uint16_t *q_half, *dout_half;        // [rows at once][Dp]
  Pick *picks;                         // of a portion, block by block
  int64_t *stop;                       // [NB + 1]: where the picks of the blocks before end
  float *row_m, *row_l, *row_delta;    // [portion rows]
  float *row_sums, *row_dout;          // [portion rows][Dp]; in the backward row_sums is dq
};

}  // namespace
