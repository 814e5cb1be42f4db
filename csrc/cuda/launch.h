// H += tril(Xᵀ X) on a GPU, for callers that know neither CUDA nor, on this side, torch: plain pointers and numbers.
// Errors are cudaError_t as int, 0 for none.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quailora::cuda {

enum class Element { bfloat16, float16, float32 };

struct Gram {
  Element element;
  const void* x;         // (tokens, features) of `element`, its features contiguous
  int64_t x_row_stride;  // in elements; any, though 16-byte alignment of `x` and of its rows is much faster
  const uint8_t* keep;   // (tokens,) 0 or 1, or null for all: a token with 0 is never read
  int64_t tokens;
  int features;
  float* h;              // (features, features): only the lower triangle is read and written
  int64_t h_row_stride;  // in elements
};

// How much memory `gram_` needs to work in: 0 where there are tiles enough to occupy the current device.
int scratch_bytes(const Gram& gram, size_t* bytes);

// Adds the tokens to H on the stream (a cudaStream_t) of the current device, and does not wait. `scratch`, 16-byte
// aligned, is in use until the stream is through. The same input gives the same bits, on every GPU with as many
// multiprocessors: how tokens are split over blocks follows from features, tokens and that number alone.
int gram_(const Gram& gram, void* scratch, void* stream);

const char* error_string(int error);

}  // namespace quailora::cuda
