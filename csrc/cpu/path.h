// What a path (a way to compute for one kind of processor) has to bring.
#pragma once

#include "columns.h"
#include "gram.h"

namespace quailora {

// H is computed in tiles of this many rows and columns: a multiple of the 12, 24, 32 and 48 that the paths work in. The
// sums of a tile are 36 KiB, which the nearest caches hold, and a small H (n = 576) still has 21 tiles to share out.
constexpr int64_t kTile = 96;

// A brick holds one block of tokens by kTile features, in the order in which `multiply` reads it.
struct Kernel {
  int64_t block;        // the most tokens a brick holds
  int64_t brick_bytes;  // a multiple of 64: bricks are aligned to cache lines
  // Fills a brick with tokens first .. first + count - 1, features from `feature` on; zeros where either ends.
  void (*pack)(const Tokens& tokens, int64_t first, int64_t count, int64_t feature, void* brick);
  // sum (kTile, kTile) += rowsᵀ columns over the `count` tokens of two bricks; of a tile on the diagonal the part above
  // the diagonal may be left out.
  void (*multiply)(const void* rows, const void* columns, int64_t count, bool diagonal, float* sum);
};

// Rows of W are rounded in tiles of `rows`, and the columns of a tile in panels of `panel`, which are in registers
// together. Where fewer are left of a group of columns, each is a panel by itself.
struct ColumnKernel {
  int64_t rows, panel;
  // Rounds the tile that begins with row `first`, in scratch memory aligned to cache lines. The factor comes as
  // `pack_panels` in columns.cpp orders it.
  void (*quantize)(const ColumnsIn& in, const ColumnsOut& out, const float* factor, int64_t first, float* scratch);
};

struct Path {
  const char* name;
  bool (*runs_here)();
  const Kernel* bfloat16;
  const Kernel* wider;  // for fp16 and fp32
  const ColumnKernel* columns;
};

extern const Path amx_bf16, avx512_bf16, avx512, avx2, portable;

}  // namespace quailora
