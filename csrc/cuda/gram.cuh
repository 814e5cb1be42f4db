// H += tril(Xᵀ X): H (n, n) fp32, X (t, n) token-major in bf16, fp16 or fp32. Tensor cores, one triangle.
//
// A block computes one tile of 128 x 128 of the lower triangle for one range of tokens. Panels of X stream through a
// ring of three stages in shared memory; 8 warps each multiply 64 features of the tile's rows by 32 of its columns:
//
//               tile columns j (128)                       shared memory, one stage
//             +------+------+------+------+                +----------------------------+
//             | w 0  | w 2  | w 4  | w 6  |                | 32 tokens x 128 features i |  fp32: 16 tokens,
//   tile      |64x32 |      |      |      |                +----------------------------+  as many bytes
//   rows i    +------+------+------+------+  +=  sum of    | 32 tokens x 128 features j |
//   (128)     | w 1  | w 3  | w 5  | w 7  |                +----------------------------+
//             |      |      |      |      |                 read transposed: a token is a
//             +------+------+------+------+                 column of the one factor, a row of the other
//
// Rounding. Tensor cores add in fp32 but cut off what does not fit (Fasi et al., PeerJ Computer Science 7:e330, 2021;
// Khattak and Mikaitis, arXiv 2512.07004), which on a diagonal, where all terms are positive, shows as a bias. So they
// only ever sum 32 tokens (8 of fp32 input), from zero: a bias of 1e-7 at most. Those sums are added in ordinary fp32,
// which rounds to nearest, 16 stages (512 tokens) from zero and then to the total, since one running sum would round by
// another 2e-7 over 4096 tokens.
//
// fp32 input is taken as hi + lo, both TF32, and hi hi + hi lo + lo hi is summed: what is left out is below 2⁻²¹ of a
// product. (Two bf16 parts leave 2⁻¹⁷, six products of three parts cost what three of TF32 do.)
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include "ptx.cuh"
#else
#include "simt.h"
#endif

namespace quailora::cuda {

constexpr int kTile = 128;  // as large as the sums of 256 threads find room in registers
constexpr int kThreads = 256;
constexpr int kStages = 3;  // two on their way while one is multiplied
constexpr int kStageBytesPerFeature = 64;
constexpr int kStagesPerSum = 16;  // see Rounding
constexpr int kChunkBytes = 16;    // the most that a thread copies at once
// Rows of a panel are 8 elements longer than the tile. ldmatrix reads 8 rows of 16 bytes at once, which 272 bytes apart
// fall into distinct banks; fp32 factors are read 4 rows x 8 elements at once, rows 8 banks apart.
constexpr int kRow = kTile + 8;
constexpr int kSharedBytes = kStages * 2 * kStageBytesPerFeature * kRow;
static_assert(kSharedBytes <= 99 * 1024, "more than a block may have on sm_86 and sm_89");

// What a warp sums of its 64 x 32, in pieces of 16 x 8, the shape of one mma.
constexpr int kPieceRows = 4;
constexpr int kPieceColumns = 4;
constexpr int kPieces = kPieceRows * kPieceColumns;

// A lane's four elements of a piece, as mma lays them out.
struct alignas(16) Quad {
  float value[4];

  __device__ void operator+=(const Quad& other) {
#pragma unroll
    for (int e = 0; e < 4; ++e) value[e] += other.value[e];
  }
};

struct Arguments {
  const void* x;  // the first token of this launch
  int64_t x_row_stride;
  const uint8_t* keep;
  int64_t tokens;            // in this launch
  int64_t tokens_per_range;  // block z has the z-th range
  int ranges;
  int features;
  float* h;
  int64_t h_row_stride;
  int64_t tiles;  // of the triangle
  Quad* partial;  // (ranges, tiles, kPieces, kThreads), or null: the blocks then add to H themselves
};

// ---- factors: what multiplies a lane's share of a few tokens

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma_m16n8k16_bf16(d, a, b);
}
__device__ inline void mma(Float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma_m16n8k16_f16(d, a, b);
}

// 32 tokens of 16 features (A) and of 8 features (B), 16 tokens to an mma. `panel` points at the first of both.
template <typename Element>
struct Factors {
  static constexpr int kTokens = 32;
  struct A {
    uint32_t half[2][4];
  };
  struct B {
    uint32_t half[2][2];
  };

  static __device__ A load_a(const Element* panel, int lane) {
    A a;
    // The four matrices are quarters of 16 tokens x 16 features: features 0-7, 8-15 of tokens 0-7, then of 8-15.
    const int matrix = lane / 8;
    const Element* row = panel + (lane % 8 + matrix / 2 * 8) * kRow + matrix % 2 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) simt::ldmatrix_x4_trans(a.half[half], row + half * 16 * kRow);
    return a;
  }

  static __device__ B load_b(const Element* panel, int lane) {
    // Here they are 8 features of tokens 0-7, 8-15, 16-23, 24-31: each lane names the row of its own token.
    uint32_t quarters[4];
    simt::ldmatrix_x4_trans(quarters, panel + lane * kRow);
    return {{{quarters[0], quarters[1]}, {quarters[2], quarters[3]}}};
  }

  static __device__ void multiply(float (&d)[4], const A& a, const B& b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) mma(Element{}, d, a.half[half], b.half[half]);
  }
};

// 8 tokens of fp32. No instruction transposes 32-bit elements on loading: each lane fetches its own.
template <>
struct Factors<float> {
  static constexpr int kTokens = 8;
  struct A {
    float high[4], low[4];
  };
  struct B {
    float high[2], low[2];
  };

  static __device__ void split(float value, float& high, float& low) {
    high = simt::round_to_tf32(value);
    low = simt::round_to_tf32(value - high);
  }

  static __device__ A load_a(const float* panel, int lane) {
    A a;
    const float* first = panel + lane % 4 * kRow + lane / 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) split(simt::load_shared(first + e / 2 * 4 * kRow + e % 2 * 8), a.high[e], a.low[e]);
    return a;
  }

  static __device__ B load_b(const float* panel, int lane) {
    B b;
    const float* first = panel + lane % 4 * kRow + lane / 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) split(simt::load_shared(first + e * 4 * kRow), b.high[e], b.low[e]);
    return b;
  }

  static __device__ void multiply(float (&d)[4], const A& a, const B& b) {
    simt::mma_m16n8k8_tf32(d, a.low, b.high);  // the small ones first
    simt::mma_m16n8k8_tf32(d, a.high, b.low);
    simt::mma_m16n8k8_tf32(d, a.high, b.high);
  }
};

// ---- global -> shared memory

// The panels of a block, on their way through the ring of stages. Holds this thread's part: of either panel, chunks of
// 16 bytes in the same columns of several rows.
template <typename Element, bool kAligned>
struct Panels {
  static constexpr int kTokens = kStageBytesPerFeature / static_cast<int>(sizeof(Element));
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(Element));
  static constexpr int kChunksPerRow = kTile / kChunk;
  static constexpr int kRowsAtOnce = kThreads / kChunksPerRow;
  static constexpr int kChunks = kTokens / kRowsAtOnce;  // of this thread, in one panel

  struct alignas(kChunkBytes) Chunk {
    Element element[kChunk];
  };
  struct Admitted {
    bool chunk[kChunks];
  };

  const Element* source[2];  // of the first chunk, in the next stage to copy; rows of the tile, then columns
  int elements[2];           // of a chunk: fewer than kChunk, or none, where the features end
  int64_t row_stride;
  const uint8_t* keep;  // of the token of the first chunk, or null
  int tokens;           // left in the range, from that token on
  Element* target;      // of the first chunk, in the first panel of the ring

  __device__ Panels(const Arguments& arguments, int64_t begin, int64_t end, const int (&first_feature)[2]) {
    const int row = simt::thread() / kChunksPerRow, column = simt::thread() % kChunksPerRow * kChunk;
    const Element* first = static_cast<const Element*>(arguments.x) + (begin + row) * arguments.x_row_stride + column;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      source[side] = first + first_feature[side];
      const int left = arguments.features - (first_feature[side] + column);
      elements[side] = left < 0 ? 0 : left < kChunk ? left : kChunk;
    }
    row_stride = arguments.x_row_stride;
    keep = arguments.keep == nullptr ? nullptr : arguments.keep + begin + row;
    tokens = static_cast<int>(end - begin) - row;
    target = panel(0, 0) + row * kRow + column;
  }

  static __device__ Element* panel(int slot, int side) {
    return reinterpret_cast<Element*>(simt::shared_memory()) + (slot * 2 + side) * kTokens * kRow;
  }

  // Which of this thread's chunks `copy` is to take: those of tokens that are in the range, and kept.
  __device__ Admitted admit() const {
    Admitted admitted;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      admitted.chunk[c] =
          c * kRowsAtOnce < tokens && (keep == nullptr || simt::load_global(keep + c * kRowsAtOnce) != 0);
    }
    return admitted;
  }

  // Copies the next stage into a slot of the ring. What is not admitted, or not there, becomes zero and is not read.
  __device__ void copy(int slot, const Admitted& admitted) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int there = admitted.chunk[c] ? elements[side] : 0;
        const Element* from = source[side] + c * kRowsAtOnce * row_stride;
        Element* to = target + ((slot * 2 + side) * kTokens + c * kRowsAtOnce) * kRow;
        if constexpr (kAligned) {
          simt::cp_async16(to, from, there * static_cast<int>(sizeof(Element)));
        } else {
          Chunk chunk{};
#pragma unroll
          for (int e = 0; e < kChunk; ++e) {
            if (e < there) chunk.element[e] = simt::load_global(from + e);
          }
          simt::store_shared(reinterpret_cast<Chunk*>(to), chunk);
        }
      }
      source[side] += kTokens * row_stride;
    }
    if (keep != nullptr) keep += kTokens;
    tokens -= kTokens;
  }
};

// ---- the tile

struct Tile {
  int row, column;  // in tiles, column <= row

  __device__ int64_t index() const { return int64_t{row} * (row + 1) / 2 + column; }
};

// Where a piece of a warp's 64 x 32 lies in the tile.
__device__ inline int piece_row(int warp, int piece) { return warp % 2 * 64 + piece / kPieceColumns * 16; }
__device__ inline int piece_column(int warp, int piece) { return warp / 2 * 32 + piece % kPieceColumns * 8; }

// Calls use(element, address) for those of this lane's four elements of a piece that are in the triangle.
template <typename Use>
__device__ inline void for_each_in_h(const Arguments& arguments, Tile tile, int piece, Use use) {
  const int warp = simt::thread() / 32, lane = simt::thread() % 32;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int i = tile.row * kTile + piece_row(warp, piece) + lane / 4 + e / 2 * 8;
    const int j = tile.column * kTile + piece_column(warp, piece) + lane % 4 * 2 + e % 2;
    if (i < arguments.features && j <= i) use(e, arguments.h + i * arguments.h_row_stride + j);
  }
}

// H += sum, for some pieces of a tile. All loads come before all stores, else each store would wait for its load.
template <int kCount>
__device__ inline void add_to_h(const Arguments& arguments, Tile tile, int first_piece, Quad (&sum)[kCount]) {
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    for_each_in_h(arguments, tile, first_piece + p,
                  [&](int e, float* address) { sum[p].value[e] += simt::load_global(address); });
  }
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    for_each_in_h(arguments, tile, first_piece + p,
                  [&](int e, float* address) { simt::store_global(address, sum[p].value[e]); });
  }
}

// This lane's part of a piece, summed over a range.
__device__ inline Quad* partial_sum(const Arguments& arguments, int range, Tile tile, int piece) {
  return arguments.partial + ((range * arguments.tiles + tile.index()) * kPieces + piece) * kThreads + simt::thread();
}

// Blocks (side, side, ranges), side = ceil(n / 128); those above the diagonal have nothing to do.
template <typename Element, bool kAligned>
__global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ Arguments arguments) {
  using Input = Panels<Element, kAligned>;
  using Step = Factors<Element>;
  const Tile tile{static_cast<int>(simt::block().y), static_cast<int>(simt::block().x)};
  const int range = simt::block().z;
  if (tile.column > tile.row) return;

  const int64_t begin = range * arguments.tokens_per_range;
  const int64_t full = begin + arguments.tokens_per_range;
  const int64_t end = full < arguments.tokens ? full : arguments.tokens;
  Input input(arguments, begin, end, {tile.row * kTile, tile.column * kTile});
  const int stages = static_cast<int>((end - begin + Input::kTokens - 1) / Input::kTokens);

  const int warp = simt::thread() / 32, lane = simt::thread() % 32;
  Quad total[kPieces] = {}, sum[kPieces] = {};

#pragma unroll
  for (int slot = 0; slot < kStages - 1; ++slot) {
    input.copy(slot, input.admit());
    simt::cp_async_commit();
  }
  int slot = 0, free_slot = kStages - 1;
  for (int stage = 0; stage < stages; ++stage) {
    const auto admitted = input.admit();  // asked for before the wait, which hides how long it takes
    simt::cp_async_wait<kStages - 2>();
    // Now all copies of this stage have landed, and all warps are done with the stage before, whose slot is free.
    simt::block_sync();
    input.copy(free_slot, admitted);
    simt::cp_async_commit();

#pragma unroll 1  // unrolled, the two steps of fp32 would not fit the registers
    for (int token = 0; token < Input::kTokens; token += Step::kTokens) {
      typename Step::B b[kPieceColumns];
#pragma unroll
      for (int n = 0; n < kPieceColumns; ++n) {
        b[n] = Step::load_b(Input::panel(slot, 1) + token * kRow + piece_column(warp, n), lane);
      }
#pragma unroll
      for (int m = 0; m < kPieceRows; ++m) {
        const auto a = Step::load_a(Input::panel(slot, 0) + token * kRow + piece_row(warp, m * kPieceColumns), lane);
#pragma unroll
        for (int n = 0; n < kPieceColumns; ++n) {
          Quad product = {};
          Step::multiply(product.value, a, b[n]);
          sum[m * kPieceColumns + n] += product;
        }
      }
    }
    if (stage % kStagesPerSum == kStagesPerSum - 1 || stage == stages - 1) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        total[piece] += sum[piece];
        sum[piece] = {};
      }
    }
    free_slot = slot;
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  simt::cp_async_wait<0>();  // the zeros copied past the last stage: no block may end with copies under way

  if (arguments.partial == nullptr) {
    add_to_h(arguments, tile, 0, total);
    return;
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    simt::store_global(partial_sum(arguments, range, tile, piece), total[piece]);
  }
}

// Adds up the ranges, first to last, and adds that to H. Blocks (side, side, kPieces).
__global__ void __launch_bounds__(kThreads) add_ranges_kernel(const __grid_constant__ Arguments arguments) {
  const Tile tile{static_cast<int>(simt::block().y), static_cast<int>(simt::block().x)};
  const int piece = simt::block().z;
  if (tile.column > tile.row) return;
  Quad sum[1] = {};
  for (int range = 0; range < arguments.ranges; ++range) {
    sum[0] += simt::load_global(partial_sum(arguments, range, tile, piece));
  }
  add_to_h(arguments, tile, piece, sum);
}

}  // namespace quailora::cuda
