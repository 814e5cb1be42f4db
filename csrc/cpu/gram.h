// H += tril(Xᵀ X) on a CPU: the interface, free of torch, so that it can be built and checked by itself.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

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

// Calls the function once for each of 0 .. units - 1, in any order, on any threads.
using Parallel = std::function<void(int64_t units, const std::function<void(int64_t)>& unit)>;

struct Path;

// The path of that name; of no name, the best this processor runs.
// Throws std::invalid_argument if there is none of that name, or the processor lacks it.
const Path& path_named(const std::string& name);
std::string name(const Path& path);

// The names of the paths this processor runs, the best first.
std::vector<std::string> paths_here();

// Adds tril(Xᵀ X) to the lower triangle of h, (features, features) with rows `stride` apart. Products and sums are
// fp32. The result does not depend on the number of threads.
void add_gram(const Tokens& tokens, const Path& path, const Parallel& parallel, float* h, int64_t stride);

}  // namespace quailora
