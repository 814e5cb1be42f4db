// bf16 on the tile registers of AMX (Advanced Matrix Extensions): eight of 16 rows by 64 bytes.
//
// One instruction, tdpbf16ps, multiplies a tile of 16 features × 16 pairs of tokens by one of 16 pairs × 16 features
// and adds to a tile of 16 × 16 fp32 sums. Of the eight registers four hold sums:
//
//                     columns 0-15   16-31
//                       tile 6      tile 7
//      rows  0-15   ┌────────────┬──────────┐
//        tile 4     │   tile 0   │  tile 1  │    4 loads for 4 products
//      rows 16-31   ├────────────┼──────────┤
//        tile 5     │   tile 2   │  tile 3  │
//                   └────────────┴──────────┘
//
// The instruction sums its 32 products from zero before it adds, so long sums stay accurate and carry on from block to
// block. X comes token by token, which is the order of the right factor; the left one is the same transposed, so a
// brick holds both.
//
// The kernel is written over a handful of primitives. amx_bf16.cpp makes them of the instructions, and
// tests/unit/ops/amx_model.cpp of plain C++, so that tests run the kernel on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "pairs.h"
#include "path.h"
#include "transpose.h"

namespace quailora {
namespace {

constexpr int64_t kBlock = 256;  // tokens of a strip of 32 features are then 16 KiB: those of both factors fit L1
constexpr int64_t kSide = 16;    // of a tile, in features and in pairs of tokens
constexpr int64_t kTileBytes = kSide * 64;
constexpr int64_t kSteps = kBlock / (2 * kSide);
constexpr int64_t kFactorBytes = kTile / kSide * kSteps * kTileBytes;

// Where in a brick: the right factor's tiles come first, then the left one's; each group of 16 features step by step.
inline char* right_tile(void* brick, int64_t feature, int64_t step) {
  return static_cast<char*>(brick) + (feature / kSide * kSteps + step) * kTileBytes;
}
inline char* left_tile(void* brick, int64_t feature, int64_t step) {
  return right_tile(brick, feature, step) + kFactorBytes;
}

// By vectors: value by value, packing would not stay small beside products as fast as these.
inline void transpose(const char* from, char* to) {
  Transposition<kSide>::Row rows[kSide];
  std::memcpy(rows, from, sizeof rows);
  Transposition<kSide>::in_place(rows);
  std::memcpy(to, rows, sizeof rows);
}

inline void pack(const Tokens& tokens, int64_t first, int64_t count, int64_t feature, void* brick) {
  const int64_t steps = (count + 2 * kSide - 1) / (2 * kSide);
  for_each_pair(tokens, first, count, feature, steps * kSide, [&](int64_t pair, const uint32_t* values) {
    for (int64_t f = 0; f < kTile; f += kSide)
      std::memcpy(right_tile(brick, f, pair / kSide) + pair % kSide * 64, values + f, 64);
  });
  for (int64_t f = 0; f < kTile; f += kSide)
    for (int64_t step = 0; step < steps; ++step) transpose(right_tile(brick, f, step), left_tile(brick, f, step));
}

template <class Tiles>
inline void multiply(const void* rows, const void* columns, int64_t count, bool diagonal, float* sum) {
  constexpr int64_t stride = kTile * sizeof(float);
  void *left = const_cast<void*>(rows), *right = const_cast<void*>(columns);
  const int64_t steps = (count + 2 * kSide - 1) / (2 * kSide);
  Tiles::configure();
  for (int64_t j = 0; j < kTile; j += 2 * kSide)
    for (int64_t i = diagonal ? j : 0; i < kTile; i += 2 * kSide) {
      float *top = sum + i * kTile + j, *bottom = top + kSide * kTile;
      Tiles::template load<0>(top, stride);
      Tiles::template load<1>(top + kSide, stride);
      Tiles::template load<2>(bottom, stride);
      Tiles::template load<3>(bottom + kSide, stride);
      for (int64_t step = 0; step < steps; ++step) {
        Tiles::template load<4>(left_tile(left, i, step), 64);
        Tiles::template load<6>(right_tile(right, j, step), 64);
        Tiles::template multiply_add<0, 4, 6>();
        Tiles::template load<7>(right_tile(right, j + kSide, step), 64);
        Tiles::template multiply_add<1, 4, 7>();
        Tiles::template load<5>(left_tile(left, i + kSide, step), 64);
        Tiles::template multiply_add<2, 5, 6>();
        Tiles::template multiply_add<3, 5, 7>();
      }
      Tiles::template store<0>(top, stride);
      Tiles::template store<1>(top + kSide, stride);
      Tiles::template store<2>(bottom, stride);
      Tiles::template store<3>(bottom + kSide, stride);
    }
  Tiles::release();
}

template <class Tiles>
constexpr Kernel amx_kernel() {
  return {kBlock, 2 * kFactorBytes, pack, multiply<Tiles>};
}

}  // namespace
}  // namespace quailora
