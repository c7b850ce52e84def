// Sizes of tiles, and the thresholds that choose between two ways to compute the same.
#pragma once

#include <cstdint>
#include <limits>

namespace {

constexpr float LOG2E = 1.44269504088896341f;
constexpr float INF = std::numeric_limits<float>::infinity();

constexpr int TILE_ROWS = 64;             // query rows of a score tile
constexpr int CHUNK = 128;                // keys of a score tile
constexpr int TILE_STRIDE = CHUNK + 16;   // between its rows: a power of two would crowd a column into few cache sets
constexpr int SEGMENT = 64;               // keys that lie side by side
constexpr int GROUP = 16;                 // rows of a score tile that skip hidden panels together
constexpr int64_t ROWS_AT_ONCE = 512;     // query rows (of G heads) that meet a chunk of keys while it is in cache
constexpr int64_t PORTION_ROWS = 4096;    // query rows that are walked together by key block

constexpr int64_t FEW_PICKS = 2;     // of a key block in a portion, on average: below, each row walks its own list
constexpr int64_t FP16_TERMS = 64;   // summed in fp16 before they join a sum in fp32
constexpr float FP16_SPREAD = 4096.f;  // largest magnitude of a row over that of another, for products in fp16
constexpr float MAX_SLACK = 2.f;     // a row's maximum may grow by this much before its sums are rescaled

}  // namespace
