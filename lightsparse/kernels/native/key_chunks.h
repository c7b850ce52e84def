// The keys of one row of a table, a chunk at a time: segments of packed keys, or keys gathered one by one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "call.h"

namespace {

struct Span {  // columns of a segment that belong to one entry of the table
  int entry, column, count;
};

struct Segment {  // keys that lie side by side, up to SEGMENT
  int n, padded;  // keys; rounded up to 16
  int panel;      // its first; -1 where gathered
  int spans, first_span;
  const float *kt, *vt, *kn, *vn;               // panels, rows
  const uint16_t *kh = nullptr, *vh = nullptr;  // rows in fp16
  const int32_t *from, *until, *doc;
  const uint64_t *hashes;
  int64_t key;     // its first; -1 where gathered
  float *dk, *dv;  // rows of Dp
  KeyRange range;
};

struct KeyChunks {
  const Call &call;
  Scratch &s;
  int64_t unit, b;
  const int32_t *entries;
  int64_t count;  // of entries
  bool dense;
  float *dk, *dv;                  // of the unit: [Nkv][Dp]
  int64_t entry = -1, block = -1;  // where the walk stands
  int64_t offset = 0, left = 0;    // in the block
  int segments = 0, spans = 0;     // of the present chunk
  Segment segment[CHUNK / 16];
  Span span[CHUNK];

  KeyChunks(const Call &call_, Scratch &s_, int64_t unit_, const int32_t *entries_, int64_t count_, bool dense_,
            float *dk_, float *dv_)
      : call(call_), s(s_), unit(unit_), b(unit_ / call_.a.Hkv), entries(entries_), count(count_), dense(dense_),
        dk(dk_), dv(dv_) {}

  bool next() {  // reads the next chunk; false where no keys are left
    segments = spans = 0;
    int columns = 0;
    while (columns < CHUNK && more()) {
      if (call.gather) {
        columns = SEGMENT * (segments + 1);
        gather_segment();
      } else {
        const int n = (int)std::min(left, (int64_t)SEGMENT), padded = (n + 15) / 16 * 16;
        if (columns + padded > CHUNK) break;
        add_packed(n, padded);
        columns += padded;
        offset += n, left -= n;
      }
    }
    return segments > 0;
  }

  void scatter() {  // adds the gradients of gathered keys where they belong
    if (!call.gather) return;
    const int64_t Dp = call.Dp;
    for (int i = 0; i < segments; i++)
      for (int c = 0; c < segment[i].n; c++) {
        float *to_k = dk + s.ids[i * SEGMENT + c] * Dp, *to_v = dv + s.ids[i * SEGMENT + c] * Dp;
        for (int64_t d = 0; d < Dp; d++) to_k[d] += segment[i].dk[c * Dp + d], to_v[d] += segment[i].dv[c * Dp + d];
      }
  }

 private:
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

  void add_span(Segment &x, int column, int keys) {
    span[spans++] = Span{dense ? -1 : (int)entry, column, keys};
    x.spans++;
  }

  void add_packed(int n, int padded) {  // to the last segment, where the keys follow its own, or as a new one
    const Args &a = call.a;
    const int64_t key = block * a.kv_block + offset, panel = (block * call.padded_block + offset) / 16;
    const KeyRange *ranges = call.ranges_of_sample(b) + panel;
    Segment *last = segments ? &segment[segments - 1] : nullptr;
    if (last && last->n == last->padded && last->panel + last->padded / 16 == panel && last->key + last->n == key &&
        last->padded + padded <= SEGMENT) {
      add_span(*last, last->padded, n);
      last->n += n, last->padded += padded;
      for (int p = 0; p < padded / 16; p++) last->range.add(ranges[p]);
      return;
    }
    Segment &x = segment[segments++];
    x.n = n, x.padded = padded, x.panel = (int)panel, x.spans = 0, x.first_span = spans, x.key = key;
    add_span(x, 0, n);
    const int64_t at = (unit * call.panels + panel) * 16 * call.Dp, row = (unit * a.Nkv + key) * call.Dp;
    x.kt = call.kt + at;
    x.vt = call.backward ? call.vt + at : nullptr;
    x.kh = call.kh ? call.kh + row : nullptr, x.vh = call.vh ? call.vh + row : nullptr;
    x.kn = call.kn ? call.kn + row : call.direct ? (const float *)a.k + call.offset_k(unit, key) : nullptr;
    x.vn = call.vn ? call.vn + row : call.direct ? (const float *)a.v + call.offset_v(unit, key) : nullptr;
    x.from = a.from + b * a.from_b + key, x.until = a.until + b * a.until_b + key;
    x.doc = a.kv_doc ? a.kv_doc + b * a.kv_doc_b + key : nullptr;
    x.hashes = call.hashes ? call.hashes + key : nullptr;
    x.dk = call.backward ? dk + key * call.Dp : nullptr, x.dv = call.backward ? dv + key * call.Dp : nullptr;
    x.range.clear();
    for (int p = 0; p < padded / 16; p++) x.range.add(ranges[p]);
  }

  void gather_segment() {  // up to SEGMENT keys of any blocks
    const Args &a = call.a;
    const int64_t Dp = call.Dp, first = segments * SEGMENT;
    Segment &x = segment[segments++];
    x.n = x.spans = 0, x.first_span = spans, x.panel = -1, x.key = -1;
    while (x.n < SEGMENT && more()) {
      const int n = (int)std::min(left, (int64_t)(SEGMENT - x.n));
      add_span(x, x.n, n);
      for (int i = 0; i < n; i++) {
        const int64_t key = block * a.kv_block + offset + i, at = first + x.n + i;
        s.ids[at] = key;
        read_row(a.bf16, a.k, call.offset_k(unit, key), a.D, Dp, 1.f, s.kn + at * Dp);
        read_row(a.bf16, a.v, call.offset_v(unit, key), a.D, Dp, 1.f, s.vn + at * Dp);
        s.from[at] = a.from[b * a.from_b + key], s.until[at] = a.until[b * a.until_b + key];
        if (a.kv_doc) s.kv_doc[at] = a.kv_doc[b * a.kv_doc_b + key];
        if (call.hashes) s.hashes[at] = call.hashes[key];
      }
      x.n += n, offset += n, left -= n;
    }
    x.padded = (x.n + 15) / 16 * 16;
    std::memset(s.kn + (first + x.n) * Dp, 0, (x.padded - x.n) * Dp * 4);
    std::memset(s.vn + (first + x.n) * Dp, 0, (x.padded - x.n) * Dp * 4);
    for (int p = 0; p < x.padded; p += 16) {
      transpose_panel(s.kn + (first + p) * Dp, Dp, Dp, s.kt + (first + p) * Dp);
      if (call.backward) transpose_panel(s.vn + (first + p) * Dp, Dp, Dp, s.vt + (first + p) * Dp);
    }
    x.kt = s.kt + first * Dp, x.vt = s.vt + first * Dp, x.kn = s.kn + first * Dp, x.vn = s.vn + first * Dp;
    x.from = s.from + first, x.until = s.until + first, x.doc = a.kv_doc ? s.kv_doc + first : nullptr;
    x.hashes = s.hashes + first;
    x.range = range_of(x.from, x.until, x.doc, x.n);
    x.dk = s.dk + first * Dp, x.dv = s.dv + first * Dp;
    if (call.backward) {
      std::memset(x.dk, 0, x.padded * Dp * 4);
      std::memset(x.dv, 0, x.padded * Dp * 4);
    }
  }
};

}  // namespace
