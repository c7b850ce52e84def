// The backward over all rows of a call, by several threads.
//
// Rows are dealt out in contiguous shares of equal cost. Where a share begins inside a unit, its gradients of keys and
// values go to a slab of their own, added to the unit's in the order of the shares: no race, the same bits every time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "walk_forward.h"

namespace {

// Where each of so many shares of rows begins; at the end the number of rows.
std::vector<int64_t> cut_into_shares(const Call &call, int shares, int64_t tables) {
  const Args &a = call.a;
  const int64_t per_unit = tables * a.NQ, rows = call.units * per_unit;
  std::vector<double> cost(rows + 1, 0.0);  // of the rows before
  for (int64_t i = 0; i < rows; i++) {
    const int64_t unit = i / per_unit, table = i / a.NQ % tables, row = i % a.NQ;
    const int64_t queries = std::min(a.q_block, a.Nq - row * a.q_block) * call.G;
    cost[i + 1] = cost[i] + (double)(call.keys_of_row(call.table_row(unit, table, row), row) + 1) * (queries + 8);
  }
  std::vector<int64_t> cut(shares + 1, rows);
  for (int t = 0; t < shares; t++)
    cut[t] = std::lower_bound(cost.begin(), cost.end(), cost[rows] * t / shares) - cost.begin();
  return cut;
}

void walk_backward(Call &call) {
  const Args &a = call.a;
  ask_for_large_pages(a.work, call.arena.used());
  Team team(call.threads);
  const int shares = team.size();
  pack(call, team);
  const int64_t tables = call.by_block ? 1 : call.tables;  // by block, a query's rows are walked together
  const int64_t per_unit = tables * a.NQ;
  const std::vector<int64_t> cut = cut_into_shares(call, shares, tables);
  const int64_t size = a.Nkv * call.Dp;
  auto slab = [&](int share) { return call.slabs + (share - 1) * 2 * size; };
  team.run([&](int me) {
    float *dk = nullptr, *dv = nullptr;
    for (int64_t i = cut[me]; i < cut[me + 1]; i++) {
      const int64_t unit = i / per_unit;
      if (i == cut[me] || i % per_unit == 0) {
        const bool own = i % per_unit == 0;
        dk = own ? call.dk + unit * size : slab(me), dv = own ? call.dv + unit * size : slab(me) + size;
        std::memset(dk, 0, size * 4);
        std::memset(dv, 0, size * 4);
      }
      if (call.by_block) {  // all of the share's queries of this unit
        const int64_t stop = std::min(cut[me + 1], (unit + 1) * per_unit);
        walk_portions(call, call.scratch[me], unit, i - unit * per_unit, stop - unit * per_unit, dk, dv);
        i = stop - 1;
      } else {
        walk_row(call, call.scratch[me], unit, i / a.NQ % tables, i % a.NQ, dk, dv);
      }
    }
  });
  std::atomic<int64_t> next{0};
  const int64_t at_once = 256, parts = (a.Nkv + at_once - 1) / at_once;
  team.run([&](int) {
    for (int64_t p; (p = next++) < call.units * parts;) {
      const int64_t unit = p / parts, first = p % parts * at_once, stop = std::min(first + at_once, a.Nkv);
      for (int t = 1; t < shares; t++)
        if (cut[t] < cut[t + 1] && cut[t] % per_unit && cut[t] / per_unit == unit)
          for (int which = 0; which < 2; which++) {
            float *to = (which ? call.dv : call.dk) + unit * size;
            const float *add = slab(t) + which * size;
            for (int64_t d = first * call.Dp; d < stop * call.Dp; d++) to[d] += add[d];
          }
      if (call.direct) continue;
      for (int64_t key = first; key < stop; key++) {
        const int64_t from = unit * size + key * call.Dp, to = (unit * a.Nkv + key) * a.D;
        write_row(a.bf16, a.dk, to, a.D, 1.f, call.dk + from);
        write_row(a.bf16, a.dv, to, a.D, 1.f, call.dv + from);
      }
    }
  });
}

}  // namespace
