// Tokens widened to fp32, which is exact from bf16 and fp16, and multiplied in fp32: what every processor can do.
//
// To be included after the pragma that names the path's processor, so that all of it is compiled for that one.
#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"
#include "path.h"
#include "registers.h"

namespace quailora {
namespace {

// A panel of 48 columns is then 24 KiB, half of the first cache.
constexpr int64_t kBlock = 128;

template <int kLanesHere>
struct Fp32 {
  static constexpr int kLanes = kLanesHere, kTokens = 1;
  using Element = float;

#if defined(__GNUC__) && !defined(QUAILORA_PLAIN_VECTORS)
  typedef float Vector __attribute__((vector_size(kLanesHere * sizeof(float))));
  static Vector multiply_add(float row, Vector columns, Vector sums) { return row * columns + sums; }
  static Vector plus(Vector a, Vector b) { return a + b; }
#else
  struct Vector {
    float lane[kLanesHere];
  };
  static Vector multiply_add(float row, Vector columns, Vector sums) {
    for (int i = 0; i < kLanes; ++i) sums.lane[i] += row * columns.lane[i];
    return sums;
  }
  static Vector plus(Vector a, Vector b) { return multiply_add(1, a, b); }
#endif

  static Vector zero() { return Vector{}; }
  static Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static void add_to(float* sum, Vector v) {
    const Vector total = plus(load(sum), v);
    std::memcpy(sum, &total, sizeof total);
  }
};

struct Bfloat16 {
  uint16_t bits;
  float widen() const { return from_bits(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  uint16_t bits;
  // Without a branch, so that a loop of it becomes vector code, and without fp32 subnormals, which are slow.
  float widen() const {
    const uint32_t magnitude = bits & 0x7fffu, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (112u << 23);  // the exponent's bias, 15, becomes 127
    const uint32_t infinite = normal + (112u << 23);           // and its largest, 31, becomes 255
    const float half = 0.5f;                                   // whose last place is 2⁻²⁴, as a subnormal's is
    const uint32_t subnormal = to_bits(from_bits(to_bits(half) + magnitude) - half);
    return from_bits(sign | (magnitude < 0x0400u ? subnormal : magnitude < 0x7c00u ? normal : infinite));
  }
};

struct Float32 {
  float value;
  float widen() const { return value; }
};

template <class Math, class Value>
inline void pack_rows(const Tokens& tokens, int64_t first, int64_t count, int64_t feature, float* brick) {
  const auto* data = static_cast<const Value*>(tokens.data);
  const int64_t width = tokens.features - feature;
  for (int64_t token = 0; token < count; ++token) {
    const Value* row = data + tokens.offsets[first + token] + feature;
    Value padded[kTile] = {};
    if (width < kTile) {
      std::memcpy(padded, row, width * sizeof(Value));
      row = padded;
    }
    for (int64_t panel = 0; panel < kTile; panel += kPanel<Math>) {
      float* out = brick + panel * kBlock + token * kPanel<Math>;
      for (int64_t i = 0; i < kPanel<Math>; ++i) out[i] = row[panel + i].widen();
    }
  }
}

template <class Math>
inline void pack(const Tokens& tokens, int64_t first, int64_t count, int64_t feature, void* brick) {
  auto* values = static_cast<float*>(brick);
  if (tokens.dtype == Dtype::bfloat16)
    pack_rows<Math, Bfloat16>(tokens, first, count, feature, values);
  else if (tokens.dtype == Dtype::float16)
    pack_rows<Math, Float16>(tokens, first, count, feature, values);
  else
    pack_rows<Math, Float32>(tokens, first, count, feature, values);
}

template <class Math>
inline void multiply(const void* rows, const void* columns, int64_t count, bool diagonal, float* sum) {
  multiply_panels<Math>(rows, columns, kBlock, count, diagonal, sum);
}

template <class Math>
constexpr Kernel fp32_kernel() {
  return {kBlock, kBlock * kTile * static_cast<int64_t>(sizeof(float)), pack<Math>, multiply<Math>};
}

}  // namespace
}  // namespace quailora
