// Columns rounded with error feedback: the walk over the rows, the same for every path.
//
// Rows do not depend on each other, so each tile of them is one worker's. What all tiles share is the factor U.
#include "columns.h"

#include <algorithm>
#include <cstring>

#include "aligned.h"
#include "path.h"

namespace quailora {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// U in the order in which it is read: panel by panel of columns, of which each is row by row, and only to the diagonal.
// The panel that begins with column j begins j · k values from the start. (In place its rows would lie a whole row of H
// apart, often a power of two, so that they displace each other from the caches.)
void pack_panels(const ColumnsIn& in, int64_t panel, float* to) {
  for (int64_t start = 0; start < in.columns; start += in.group)
    for (int64_t j = start, width; j < start + in.group; j += width) {
      width = start + in.group - j < panel ? 1 : panel;
      for (int64_t i = 0; i < j + width; ++i)
        std::memcpy(to + j * in.columns + i * width, in.factor[i] + j, width * sizeof(float));
    }
}

}  // namespace

void quantize_columns(const ColumnsIn& in, const ColumnsOut& out, const Path& path, const Parallel& parallel) {
  const ColumnKernel& kernel = *path.columns;
  constexpr int64_t kMostLanes = 16, kValue = sizeof(float);
  const Aligned factor(in.columns * in.columns * kValue);
  pack_panels(in, kernel.panel, static_cast<float*>(factor.data));
  parallel(ceil_div(in.rows, kernel.rows), [&](int64_t tile) {
    const Aligned scratch(2 * ceil_div(in.columns, kMostLanes) * kMostLanes * kernel.rows * kValue);
    kernel.quantize(in, out, static_cast<const float*>(factor.data), tile * kernel.rows,
                    static_cast<float*>(scratch.data));
  });
}

}  // namespace quailora
