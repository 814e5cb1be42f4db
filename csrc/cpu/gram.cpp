// The walk over H, the same for every path.
//
//            features                        H, lower triangle, in tiles of 96 × 96
//         0    96   192  288                 ┌────┐
//        ┌────┬────┬────┬──                  │ 00 │╲        a tile on the diagonal: its lower half
// block 0│ a0 │ b0 │ c0 │                    ├────┼────┐
//        ├────┼────┼────┼──                  │ 10 │ 11 │╲
// block 1│ a1 │ b1 │ c1 │   X, packed        ├────┼────┼────┐
//        ├────┼────┼────┼── into bricks      │ 20 │ 21 │ 22 │╲
//
// Tile 10 is b0ᵀ a0 + b1ᵀ a1 + ..., summed from zero over a chunk of tokens in a buffer of the worker's own and then
// added to H. Every tile is one worker's, so no order of events changes a result.
//
// One fp32 sum over a million tokens is too inaccurate. So sums are in tiers, each from zero: within a brick as the
// path does it, over the bricks of a chunk, over the chunks in H.

#include "gram.h"

#include <algorithm>
#include <utility>

#include "aligned.h"
#include "path.h"

namespace quailora {
namespace {

// Tokens packed at a time: the scratch memory is n × 4 KiB for fp32 and half of that for bf16 (with AMX as much). H is
// read and written once in each chunk, little beside 1024 products for each of its values. A million tokens come to
// 1024 sums in H, whose error is 4e-7; half the chunk would make it 6e-7, twice the chunk would cost AMX, which sums
// through a chunk, its margin below 2e-7.
constexpr int64_t kChunk = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// (row, column) of every tile, the whole ones first: half tiles even out the work at the end.
std::vector<std::pair<int64_t, int64_t>> lower_triangle(int64_t tiles) {
  std::vector<std::pair<int64_t, int64_t>> places;
  for (int64_t row = 0; row < tiles; ++row)
    for (int64_t column = 0; column < row; ++column) places.emplace_back(row, column);
  for (int64_t both = 0; both < tiles; ++both) places.emplace_back(both, both);
  return places;
}

}  // namespace

void add_gram(const Tokens& tokens, const Path& path, const Parallel& parallel, float* h, int64_t stride) {
  const Kernel& kernel = tokens.dtype == Dtype::bfloat16 ? *path.bfloat16 : *path.wider;
  const int64_t features = tokens.features, tiles = ceil_div(features, kTile);
  const auto places = lower_triangle(tiles);
  const Aligned bricks(ceil_div(std::min(tokens.count, kChunk), kernel.block) * tiles * kernel.brick_bytes);
  const auto brick = [&](int64_t block, int64_t tile) {
    return static_cast<char*>(bricks.data) + (block * tiles + tile) * kernel.brick_bytes;
  };

  for (int64_t first = 0; first < tokens.count; first += kChunk) {
    const int64_t chunk = std::min(tokens.count - first, kChunk), blocks = ceil_div(chunk, kernel.block);
    const auto length = [&](int64_t block) { return std::min(chunk - block * kernel.block, kernel.block); };

    parallel(blocks * tiles, [&](int64_t unit) {
      const int64_t block = unit / tiles, tile = unit % tiles;
      kernel.pack(tokens, first + block * kernel.block, length(block), tile * kTile, brick(block, tile));
    });

    parallel(static_cast<int64_t>(places.size()), [&](int64_t unit) {
      const auto [row, column] = places[unit];
      alignas(64) float sum[kTile * kTile] = {};
      for (int64_t block = 0; block < blocks; ++block)
        kernel.multiply(brick(block, row), brick(block, column), length(block), row == column, sum);

      const int64_t top = row * kTile, left = column * kTile;
      for (int64_t i = 0; i < std::min(kTile, features - top); ++i) {
        float* into = h + (top + i) * stride + left;
        const int64_t width = row == column ? i + 1 : kTile;
        for (int64_t j = 0; j < width; ++j) into[j] += sum[i * kTile + j];
      }
    });
  }
}

}  // namespace quailora
