// Some thousand queries that each choose blocks of their own, walked by key block.
//
// The rows that picked a block meet it in tiles, in the order of the queries. What a row has summed so far, or its dq,
// waits in the portion's buffers from one of its blocks to the next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "backward.h"
#include "forward.h"

namespace {

// The queries of one row of a table, all heads that share it.
void walk_row(Call &call, Scratch &s, int64_t unit, int64_t table, int64_t row, float *dk, float *dv) {
  const Args &a = call.a;
  const int64_t stop = std::min((row + 1) * a.q_block, a.Nq), at_once = call.rows_at_once / call.G;
  for (int64_t first = row * a.q_block; first < stop; first += at_once) {
    QueryRows rows(call, s, unit, table, row, first, std::min(at_once, stop - first));
    KeyChunks chunks(call, s, unit, call.table_row(unit, table, row), a.K, a.dense_row[row], dk, dv);
    if (call.backward)
      rows.backward(chunks);
    else
      rows.forward(chunks);
  }
}

struct Portion {  // queries first … stop − 1 of a unit
  Call &call;
  Scratch &s;
  int64_t unit, first, stop, heads, b;
  float *dk, *dv;

  Portion(Call &call_, Scratch &s_, int64_t unit_, int64_t first_, int64_t stop_, float *dk_, float *dv_)
      : call(call_), s(s_), unit(unit_), first(first_), stop(stop_), heads(call_.heads()), b(unit_ / call_.a.Hkv),
        dk(dk_), dv(dv_) {}

  void walk() {
    sort_picks();
    for (int64_t i = first; i < stop; i++)
      if (call.a.dense_row[i])
        for (int64_t table = 0; table < call.tables; table++) walk_row(call, s, unit, table, i, dk, dv);
    call.backward ? backward() : forward();
  }

 private:
  void sort_picks() {  // by block, in linear time
    std::fill(s.stop, s.stop + call.NB + 1, 0);
    each_pick([&](int64_t block, int64_t, int64_t) { s.stop[block + 1] += call.G; });
    for (int64_t block = 0; block < call.NB; block++) s.stop[block + 1] += s.stop[block];
    each_pick([&](int64_t block, int64_t row, int64_t entry) {  // moves stop[block] from its first pick behind its last
      for (int64_t g = 0; g < call.G; g++) s.picks[s.stop[block]++] = Pick{(int32_t)(row + g), (int32_t)entry};
    });
  }

  template <class Use>
  void each_pick(Use use) const {  // use(block, first row that reads it there, entry)
    for (int64_t i = first; i < stop; i++)
      for (int64_t table = 0; table < call.tables; table++) {
        const int32_t *entries = call.table_row(unit, table, i);
        for (int64_t e = 0; e < call.a.K; e++)
          if (entries[e] >= 0) use(entries[e], (i - first) * heads + table, e);
      }
  }

  template <class Use>
  void each_tile(Use use) {  // use(rows, chunks of their block)
    for (int32_t block = 0; block < call.NB; block++)
      for (int64_t at = block ? s.stop[block - 1] : 0; at < s.stop[block]; at += TILE_ROWS) {
        QueryRows rows(call, s, unit, first, s.picks + at, std::min((int64_t)TILE_ROWS, s.stop[block] - at));
        KeyChunks chunks(call, s, unit, &block, 1, false, dk, dv);
        use(rows, chunks);
      }
  }

  template <class Use>
  void each_row(Use use) const {  // use(row, head, query); dense rows are done
    for (int64_t i = first; i < stop; i++)
      if (!call.a.dense_row[i])
        for (int64_t h = 0; h < heads; h++) use((i - first) * heads + h, call.first_head(unit, 0) + h, i);
  }

  void forward() {
    const int64_t Dp = call.Dp, count = (stop - first) * heads;
    std::fill(s.row_m, s.row_m + count, -INF);
    std::fill(s.row_l, s.row_l + count, 0.f);
    std::memset(s.row_sums, 0, count * Dp * 4);
    each_tile([&](QueryRows &rows, KeyChunks &chunks) {
      for (int64_t m = 0; m < rows.M; m++) {
        const int64_t row = rows.picks[m].row;
        s.m[m] = s.row_m[row], store(s.l + m * W, vf{s.row_l[row]});
        std::memcpy(s.sums + m * Dp, s.row_sums + row * Dp, Dp * 4);
      }
      rows.attend(chunks);
      for (int64_t m = 0; m < rows.M; m++) {
        const int64_t row = rows.picks[m].row;
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
    const int64_t Dp = call.Dp, count = (stop - first) * heads;
    each_row([&](int64_t row, int64_t h, int64_t i) {
      call.read_gradient(b, h, i, s.row_dout + row * Dp, s.rows16, s.row_m[row], s.row_l[row], s.row_delta[row]);
    });
    std::memset(s.row_sums, 0, count * Dp * 4);
    each_tile([&](QueryRows &rows, KeyChunks &chunks) {
      for (int64_t m = 0; m < rows.M; m++) {
        const int64_t row = rows.picks[m].row;
        s.m[m] = s.row_m[row], s.l[m] = s.row_l[row], s.delta[m] = s.row_delta[row];
        std::memcpy(s.dout + m * Dp, s.row_dout + row * Dp, Dp * 4);
        std::memcpy(s.dq + m * Dp, s.row_sums + row * Dp, Dp * 4);
      }
      rows.add_gradients(chunks);
      for (int64_t m = 0; m < rows.M; m++)
        std::memcpy(s.row_sums + rows.picks[m].row * Dp, s.dq + m * Dp, Dp * 4);
    });
    each_row([&](int64_t row, int64_t h, int64_t i) {
      write_row(a.bf16, a.dq, ((b * a.H + h) * a.Nq + i) * a.D, a.D, (float)a.scale, s.row_sums + row * Dp);
    });
  }
};

void walk_portions(Call &call, Scratch &s, int64_t unit, int64_t first, int64_t stop, float *dk, float *dv) {
  for (; first < stop; first += call.portion)
    Portion(call, s, unit, first, std::min(first + call.portion, stop), dk, dv).walk();
}

}  // namespace
