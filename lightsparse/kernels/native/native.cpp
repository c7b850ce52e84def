// The `native` backend: flash attention over the tiles of a block layout, forward and backward. The only unit.
//
// Arithmetic is fp32. For bf16 inputs on a CPU that multiplies fp16 (AVX512-FP16, twice the rate of fp32), the four
// products with weights or gradients of scores are fp16: 11 bits, where PyTorch's dense attention rounds both to the 8
// of bf16. Powers of two keep them in range, and a few dozen terms are summed before they join an fp32 sum. Where one
// row is larger than another by more than FP16_SPREAD, the smaller would lose its bits: such products stay fp32. Scores
// and dP always are. (VDPBF16PS runs at half the rate of fp32 on Intel's CPUs: measured 86 against 174 GFLOP/s.)
// Forward (Dao et al. 2022, arXiv 2205.14135): a row's keys come in chunks; a running maximum m and sum l rescale what
// has been summed so far. Backward: P = exp(S − lse) again, delta = rowsum(dO · O) − dlse, dS = P · (dP − delta).
// A tile has 64 rows; each 16 of them leave out the keys before the first and after the last one they may see.
// Where every query has a list of blocks of its own (q_block = 1) and many choose the same, the walk goes by key block
// over the rows of some thousand queries at a time: the rows that chose it meet it together (portion.h).
// Memory is linear in the tokens. Results depend on the number of threads only, never on their timing.
//
// Names: a unit is one (sample, key/value head); G query heads of it walk one table together, or `tables` tables one by
// one. Dp = head dim rounded up to 16. A panel holds 16 keys transposed, [D][16], so that scores of 16 keys are one
// vector.
//
// The headers, each building on those before: arguments, constants, vectors; products, half_products, rows, dropout,
// threads, ranges; buffers, call, pack; key_chunks, query_rows, scores, forward, backward; portion, walk_forward,
// walk_backward.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>

#include "walk_backward.h"

namespace {

constexpr int64_t NO_MEMORY = -1, FAILED = -2;

// What `work` returns, or the kind of the exception it throws, and then its text in `why`.
template <class Work>
int64_t caught(char *why, int64_t room, Work work) {
  auto say = [&](const char *text) {
    const int64_t length = std::min((int64_t)std::strlen(text), room - 1);
    std::memcpy(why, text, length);
    why[length] = 0;
  };
  try {
    return work();
  } catch (const std::bad_alloc &error) {
    say(error.what());
    return NO_MEMORY;
  } catch (const std::exception &error) {
    say(error.what());
  } catch (...) {
    say("an exception that is no std::exception");
  }
  return FAILED;
}

}  // namespace

// What Python calls. `why` has room for so many bytes of text; a negative result is an error and `why` says which.

extern "C" int64_t native_argument_bytes() { return sizeof(Args); }

extern "C" int64_t native_workspace(const Args *args, int64_t of_backward, char *why, int64_t room) {
  return caught(why, room, [&] { return Call(*args, of_backward, nullptr).arena.used(); });
}

extern "C" int64_t native_run(const Args *args, int64_t of_backward, char *why, int64_t room) {
  return caught(why, room, [&] {
    Call call(*args, of_backward, args->work);
    of_backward ? walk_backward(call) : walk_forward(call);
    return (int64_t)0;
  });
}
