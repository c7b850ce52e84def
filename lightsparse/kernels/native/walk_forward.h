// The forward over all rows of a call, by several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pack.h"
#include "portion.h"

namespace {

// Asks for large pages: fewer faults where memory is new, and walks over many arrays at once miss the TLB less.
void ask_for_large_pages(const void *at, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 21, from = (uintptr_t)at;
  const uintptr_t first = (from + page - 1) / page * page, stop = (from + bytes) / page * page;
  if (first < stop) madvise((void *)first, stop - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

void walk_forward(Call &call) {
  const Args &a = call.a;
  ask_for_large_pages(a.work, call.arena.used());
  Team team(call.threads);
  pack(call, team);
  std::atomic<int64_t> next{0};
  if (call.by_block) {
    const int64_t per_unit = (a.Nq + call.portion - 1) / call.portion;
    team.run([&](int me) {
      for (int64_t i; (i = next++) < call.units * per_unit;) {
        const int64_t first = i % per_unit * call.portion, stop = std::min(first + call.portion, a.Nq);
        walk_portions(call, call.scratch[me], i / per_unit, first, stop, nullptr, nullptr);
      }
    });
    return;
  }
  const int64_t NQ = a.NQ, rows = call.units * call.tables * NQ;
  team.run([&](int me) {
    for (int64_t i; (i = next++) < rows;)
      walk_row(call, call.scratch[me], i / (NQ * call.tables), i / NQ % call.tables, i % NQ, nullptr, nullptr);
  });
}

}  // namespace
