// Which kernels run, on how many blocks. Compiled by nvcc for the GPU, and by any C++20 compiler in the tests.
#include "gram.cuh"
#include "launch.h"

#include <algorithm>

namespace quailora::cuda {
namespace {

// A range is at least this long and a multiple of it, a whole number of stages for every element type.
constexpr int64_t kRangeUnit = 128;

// Then a block adds its total to H. With 8 additions of 512 tokens each the total rounds by 5e-8. The more there are,
// the more it rounds, and the less it matters how long H takes to read and write: here a seventh of the products' time.
constexpr int64_t kLongestRange = 4096;

// What a partial sum costs, in tokens that could be multiplied meanwhile: estimated, not measured. A tile's is 64 KiB,
// which one of an H100's 132 multiprocessors moves both ways, at its share of 3.35 TB/s, in 5 µs; at its share of
// 500 TFLOP/s it multiplies 600 tokens in that time. Other GPUs have about the same proportion.
constexpr int64_t kPartialSumTokens = 512;

// With so many waves of blocks the last one, half empty or not, is a small part: splitting further gains nothing.
constexpr int64_t kEnoughWaves = 4;

struct Plan {
  int64_t tokens_per_launch;
  int64_t tokens_per_range;
  int ranges;  // in a full launch

  size_t scratch_bytes(int64_t tiles) const {
    return ranges > 1 ? sizeof(Quad) * kThreads * kPieces * tiles * ranges : 0;
  }
};

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tiles_of(int features) {
  const int64_t side = ceil_divide(features, kTile);
  return side * (side + 1) / 2;
}

// Tokens are split into ranges so that tiles x ranges blocks keep the multiprocessors busy to the end: the split with
// the least waves x (tokens of a range + the cost of its partial sum).
Plan plan(int features, int64_t tokens, int multiprocessors) {
  const int64_t tiles = tiles_of(features);
  const int64_t most = std::max<int64_t>(1, multiprocessors / tiles);
  const int64_t tokens_per_launch = std::min(tokens, kLongestRange * most);
  Plan best{tokens_per_launch, 0, 0};
  int64_t least = INT64_MAX;
  for (int64_t wanted = ceil_divide(tokens_per_launch, kLongestRange);; ++wanted) {
    const int64_t length = ceil_divide(ceil_divide(tokens_per_launch, wanted), kRangeUnit) * kRangeUnit;
    const int64_t ranges = ceil_divide(tokens_per_launch, length);
    const int64_t waves = ceil_divide(tiles * ranges, multiprocessors);
    const int64_t cost = waves * (length + (ranges > 1 ? kPartialSumTokens : 0));
    if (cost < least) {
      least = cost;
      best.tokens_per_range = length;
      best.ranges = static_cast<int>(ranges);
    }
    if (length == kRangeUnit || waves >= kEnoughWaves) return best;
  }
}

constexpr int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

template <typename Element>
int launch_gram(const Arguments& arguments, dim3 blocks, void* stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(arguments.x) % kChunkBytes == 0 &&
                       arguments.x_row_stride * static_cast<int64_t>(sizeof(Element)) % kChunkBytes == 0;
  const auto kernel = aligned ? gram_kernel<Element, true> : gram_kernel<Element, false>;
  return simt::launch(kernel, blocks, kThreads, kSharedBytes, stream, arguments);
}

}  // namespace

int scratch_bytes(const Gram& gram, size_t* bytes) {
  *bytes = 0;
  if (gram.tokens == 0 || gram.features == 0) return 0;
  int multiprocessors;
  if (const int error = simt::multiprocessors(&multiprocessors)) return error;
  *bytes = plan(gram.features, gram.tokens, multiprocessors).scratch_bytes(tiles_of(gram.features));
  return 0;
}

int gram_(const Gram& gram, void* scratch, void* stream) {
  if (gram.tokens == 0 || gram.features == 0) return 0;
  int multiprocessors;
  if (const int error = simt::multiprocessors(&multiprocessors)) return error;
  const Plan launches = plan(gram.features, gram.tokens, multiprocessors);
  const unsigned side = static_cast<unsigned>(ceil_divide(gram.features, kTile));
  for (int64_t first = 0; first < gram.tokens; first += launches.tokens_per_launch) {
    const int64_t tokens = std::min(launches.tokens_per_launch, gram.tokens - first);
    const unsigned ranges = static_cast<unsigned>(ceil_divide(tokens, launches.tokens_per_range));
    const Arguments arguments{
        static_cast<const unsigned char*>(gram.x) + first * gram.x_row_stride * bytes_of(gram.element),
        gram.x_row_stride,
        gram.keep == nullptr ? nullptr : gram.keep + first,
        tokens,
        launches.tokens_per_range,
        static_cast<int>(ranges),
        gram.features,
        gram.h,
        gram.h_row_stride,
        tiles_of(gram.features),
        ranges > 1 ? static_cast<Quad*>(scratch) : nullptr,
    };
    int error = 0;
    const dim3 blocks(side, side, ranges);
    switch (gram.element) {
      case Element::bfloat16: error = launch_gram<BFloat16>(arguments, blocks, stream); break;
      case Element::float16: error = launch_gram<Float16>(arguments, blocks, stream); break;
      case Element::float32: error = launch_gram<float>(arguments, blocks, stream); break;
    }
    if (error == 0 && ranges > 1) {
      error = simt::launch(add_ranges_kernel, dim3(side, side, kPieces), kThreads, 0, stream, arguments);
    }
    if (error != 0) return error;
  }
  return 0;
}

const char* error_string(int error) { return simt::error_string(error); }

}  // namespace quailora::cuda
