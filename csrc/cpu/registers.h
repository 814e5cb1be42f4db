// sum += rowsᵀ columns with the sums held in vector registers: the inner loop of every path but AMX.
//
// A brick is cut into panels as wide as three vectors, each of them step after step; a step is a token, or a pair of
// tokens where the processor multiplies pairs. In each step four features of one brick meet a panel of the other:
//
//                     three vectors of columns
//                   ┌────────┬────────┬────────┐
//      row value  → │  sum   │  sum   │  sum   │
//      row value  → │  sum   │  sum   │  sum   │    4 broadcasts and 3 loads for 12 multiply-adds
//      row value  → │  sum   │  sum   │  sum   │
//      row value  → │  sum   │  sum   │  sum   │
//                   └────────┴────────┴────────┘
//
// Twelve sums in flight keep two multiply-add units of six cycles busy. With the columns and a broadcast they are the
// 16 registers of AVX2 and SSE; in the 32 of AVX-512 and arm64 there is room beside them for twelve totals.
#pragma once

#include <cstdint>

#include "path.h"

namespace quailora {
namespace {

// Math has kLanes, kTokens (in a step), Element (what a lane of a brick holds), Vector (of sums), zero(), plus(a, b),
// load(const Element*), multiply_add(Element row, columns, Vector sums), add_to(float*, Vector).
template <class Math>
constexpr int64_t kPanel = 3 * Math::kLanes;
constexpr int64_t kRows = 4;

// Tokens summed from zero before they are added to the total of a brick. All terms of a diagonal value are positive, so
// each addition rounds by up to 6e-8 of a growing sum; over 32 of them that comes to 8e-8 (as with AMX, which sums as
// many at a time), over 128 to 1.6e-7, too near to the 2e-7 we promise. In registers the totals cost 6 % of the time.
constexpr int64_t kRun = 32;

template <class Math, int kVectors>
inline void strip(const typename Math::Element* rows, const typename Math::Element* columns, int64_t steps,
                  float* sum) {
  typename Math::Vector totals[kRows][kVectors];
  for (auto& row : totals)
    for (auto& value : row) value = Math::zero();
  for (int64_t step = 0; step < steps;) {
    typename Math::Vector sums[kRows][kVectors];
    for (auto& row : sums)
      for (auto& value : row) value = Math::zero();
    const int64_t rest = steps - step, run = kRun / Math::kTokens;
    for (const int64_t stop = step + (rest < run ? rest : run); step < stop; ++step) {
      decltype(Math::load(columns)) column[kVectors];
      for (int v = 0; v < kVectors; ++v) column[v] = Math::load(columns + step * kPanel<Math> + v * Math::kLanes);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
          sums[r][v] = Math::multiply_add(rows[step * kPanel<Math> + r], column[v], sums[r][v]);
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) totals[r][v] = Math::plus(totals[r][v], sums[r][v]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) Math::add_to(sum + r * kTile + v * Math::kLanes, totals[r][v]);
}

// `capacity` is the number of steps a brick has room for, `steps` how many of them are filled.
template <class Math>
inline void multiply_panels(const void* rows, const void* columns, int64_t capacity, int64_t steps, bool diagonal,
                            float* sum) {
  const auto* left = static_cast<const typename Math::Element*>(rows);
  const auto* right = static_cast<const typename Math::Element*>(columns);
  for (int64_t j = 0; j < kTile; j += kPanel<Math>)  // this panel of columns stays in the first cache
    for (int64_t i = diagonal ? j : 0; i < kTile; i += kRows) {
      const int64_t panel = i / kPanel<Math> * kPanel<Math>;
      const auto* from = left + panel * capacity + i - panel;
      const auto* by = right + j * capacity;
      float* to = sum + i * kTile + j;
      // Across the diagonal, the vectors that lie wholly above it are left out.
      const int64_t vectors = diagonal ? (i - j + kRows - 1) / Math::kLanes + 1 : 3;
      if (vectors == 1)
        strip<Math, 1>(from, by, steps, to);
      else if (vectors == 2)
        strip<Math, 2>(from, by, steps, to);
      else
        strip<Math, 3>(from, by, steps, to);
    }
}

}  // namespace
}  // namespace quailora
