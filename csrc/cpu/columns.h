// Columns of W rounded one after the other with the errors of those before fed back, on a CPU: the interface, free of
// torch. What it computes is `quantize_columns` in quailora/ops/reference.py.
#pragma once

#include <cstdint>

#include "paths.h"

namespace quailora {

// Values of a row lie side by side, rows `stride` values apart.
template <class Value>
struct Rows {
  Value* data;
  int64_t stride;
  Value* operator[](int64_t row) const { return data + row * stride; }
};

// The arguments, as the reference has them: W is (rows, columns).
struct ColumnsIn {
  Rows<const float> weight, feedback, factor;
  const float* importance;
  int64_t rows, columns, group;
  int bits;
  bool symmetric;
  const double* clips;
  int64_t clip_count;
  Rows<const float> scales;    // without data: to be chosen
  Rows<const uint8_t> zeros;   // without data: 2^(bits - 1)
  const float* levels;         // null: integers
};

struct ColumnsOut {
  Rows<uint8_t> codes;
  Rows<float> scales;
  Rows<uint8_t> zeros;
  Rows<float> errors;
};

// Sums are fp32. The result does not depend on the number of threads.
void quantize_columns(const ColumnsIn& in, const ColumnsOut& out, const Path& path, const Parallel& parallel);

}  // namespace quailora
