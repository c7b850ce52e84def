// Once per call: keys and values in the forms that the products want, ranges of the mask, hashes of the keys.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "call.h"

namespace {

void pack_block(Call &call, int64_t unit, int64_t block, Scratch &s) {
  const Args &a = call.a;
  const int64_t Dp = call.Dp, first = block * a.kv_block, count = std::min(a.kv_block, a.Nkv - first);
  for (int64_t p = 0; p < call.padded_block / 16; p++) {
    const int64_t at = (unit * call.panels + block * (call.padded_block / 16) + p) * 16 * Dp;
    for (int which = 0; which < (call.backward ? 2 : 1); which++) {
      float *panel = (which ? call.vt : call.kt) + at;
      if (call.direct && p * 16 + 16 <= count) {
        const int64_t key = first + p * 16;
        if (which)
          transpose_panel((const float *)a.v + call.offset_v(unit, key), a.sv[2], Dp, panel);
        else
          transpose_panel((const float *)a.k + call.offset_k(unit, key), a.sk[2], Dp, panel);
        continue;
      }
      for (int64_t j = 0; j < 16; j++) {
        const int64_t key = first + p * 16 + j;
        if (p * 16 + j >= count)
          std::memset(s.rows16 + j * Dp, 0, Dp * 4);
        else if (which)
          read_row(a.bf16, a.v, call.offset_v(unit, key), a.D, Dp, 1.f, s.rows16 + j * Dp);
        else
          read_row(a.bf16, a.k, call.offset_k(unit, key), a.D, Dp, 1.f, s.rows16 + j * Dp);
      }
      transpose_panel(s.rows16, Dp, Dp, panel);
    }
  }
  for (int64_t key = first; key < first + count; key++) {
    const int64_t to = (unit * a.Nkv + key) * Dp;
#if defined(__AVX512FP16__)
    if (call.half) {
      read_row(true, call.backward ? a.k : a.v, call.backward ? call.offset_k(unit, key) : call.offset_v(unit, key),
               a.D, Dp, 1.f, s.rows16);
      halves_of(s.rows16, Dp, call.unit_scale[unit], (call.backward ? call.kh : call.vh) + to);
    }
#endif
    if (call.kn) read_row(a.bf16, a.k, call.offset_k(unit, key), a.D, Dp, 1.f, call.kn + to);
    if (call.vn) read_row(a.bf16, a.v, call.offset_v(unit, key), a.D, Dp, 1.f, call.vn + to);
  }
}

// The scale of a unit's keys (backward) or values (forward) in fp16.
void measure_unit(Call &call, int64_t unit, Scratch &s) {
  const Args &a = call.a;
  Magnitudes of_rows;
  for (int64_t key = 0; key < a.Nkv; key++) {
    if (call.backward)
      read_row(true, a.k, call.offset_k(unit, key), a.D, call.Dp, 1.f, s.rows16);
    else
      read_row(true, a.v, call.offset_v(unit, key), a.D, call.Dp, 1.f, s.rows16);
    of_rows.add(largest_magnitude(s.rows16, call.Dp));
  }
  call.unit_scale[unit] = of_rows.wide() ? 0.f : scale_to_one(of_rows.most);
}

void measure_ranges(Call &call) {
  const Args &a = call.a;
  for (int64_t b = 0; b < call.mask_batch; b++)
    for (int64_t block = 0; block < call.NB; block++)
      for (int64_t p = 0; p < call.padded_block / 16; p++) {
        const int64_t key = block * a.kv_block + p * 16;
        const int64_t stop = std::min({key + 16, (block + 1) * a.kv_block, a.Nkv});
        call.key_ranges[b * call.panels + block * (call.padded_block / 16) + p] =
            range_of(a.from + b * a.from_b + key, a.until + b * a.until_b + key,
                     a.kv_doc ? a.kv_doc + b * a.kv_doc_b + key : nullptr, std::max(stop - key, (int64_t)0));
      }
}

void pack(Call &call, Team &team) {
  std::atomic<int64_t> next{0}, next_unit{0};
  if (call.half)
    team.run([&](int me) {
      for (int64_t unit; (unit = next_unit++) < call.units;) measure_unit(call, unit, call.scratch[me]);
    });
  const int64_t at_once = std::max((int64_t)1, 256 / call.padded_block), per_unit = (call.NB + at_once - 1) / at_once;
  team.run([&](int me) {
    if (me == 0) {
      if (call.hashes)
        for (int64_t key = 0; key < call.a.Nkv; key++) call.hashes[key] = call.hash_of_key(key);
      if (!call.gather) measure_ranges(call);
    }
    if (call.gather) return;
    for (int64_t i; (i = next++) < call.units * per_unit;) {
      int64_t block = i % per_unit * at_once;
      for (const int64_t stop = std::min(block + at_once, call.NB); block < stop; block++)
        pack_block(call, i / per_unit, block, call.scratch[me]);
    }
  });
}

}  // namespace
