// Ranges of positions and documents: whether some rows can see anything of some keys.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

struct KeyRange {  // of the keys of a panel or segment
  int32_t from_min, from_max, until_min, until_max, doc_min, doc_max;

  void clear() {
    from_min = until_min = doc_min = INT32_MAX;
    from_max = until_max = doc_max = INT32_MIN;
  }
  void add(const KeyRange &o) {
    from_min = std::min(from_min, o.from_min), from_max = std::max(from_max, o.from_max);
    until_min = std::min(until_min, o.until_min), until_max = std::max(until_max, o.until_max);
    doc_min = std::min(doc_min, o.doc_min), doc_max = std::max(doc_max, o.doc_max);
  }
};

struct RowRange {  // of some query rows
  int32_t pos_min = INT32_MAX, pos_max = INT32_MIN, doc_min = INT32_MAX, doc_max = INT32_MIN;

  void add(const RowRange &o) {
    pos_min = std::min(pos_min, o.pos_min), pos_max = std::max(pos_max, o.pos_max);
    doc_min = std::min(doc_min, o.doc_min), doc_max = std::max(doc_max, o.doc_max);
  }
  // No row sees any of the keys. False proves nothing.
  bool misses(const KeyRange &keys, bool docs) const {
    if (keys.from_min > pos_max || keys.until_max <= pos_min) return true;
    return docs && (keys.doc_min > doc_max || keys.doc_max < doc_min);
  }
  // Every row sees all of the keys. False proves nothing.
  bool sees_all(const KeyRange &keys, bool docs) const {
    if (keys.from_max > pos_min || keys.until_min <= pos_max) return false;
    return !docs || (keys.doc_min == keys.doc_max && doc_min == doc_max);  // and, not missed, they are equal
  }
};

inline KeyRange range_of(const int32_t *from, const int32_t *until, const int32_t *doc, int64_t n) {
  KeyRange r;
  r.clear();
  for (int64_t i = 0; i < n; i++) {
    r.from_min = std::min(r.from_min, from[i]), r.from_max = std::max(r.from_max, from[i]);
    r.until_min = std::min(r.until_min, until[i]), r.until_max = std::max(r.until_max, until[i]);
  }
  if (doc)
    for (int64_t i = 0; i < n; i++) r.doc_min = std::min(r.doc_min, doc[i]), r.doc_max = std::max(r.doc_max, doc[i]);
  return r;
}

}  // namespace
