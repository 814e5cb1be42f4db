// H += tril(Xᵀ X) on a CPU: the interface, free of torch, so that it can be built and checked by itself.
#pragma once

#include <cstdint>

#include "paths.h"

namespace quailora {

enum class Dtype { bfloat16, float16, float32 };

// The `count` tokens to add: token k is the row of `features` values that starts `offsets[k]` values after `data`. Such
// a list says at once what is masked (left out, so never read), how rows are strided and what the leading shape is.
struct Tokens {
  const void* data;
  Dtype dtype;
  int64_t features;
  const int64_t* offsets;
  int64_t count;
};

// Adds tril(Xᵀ X) to the lower triangle of h, (features, features) with rows `stride` apart. Products and sums are
// fp32. The result does not depend on the number of threads.
void add_gram(const Tokens& tokens, const Path& path, const Parallel& parallel, float* h, int64_t stride);

}  // namespace quailora
