// Every path of the CPU code over shapes, masks and strides, in a program of its own to be built with sanitizers: the
// tokens lie in memory of just their size, and what lies between them or belongs to a masked one is poisoned, so that
// reading any of it is caught.
#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "path.h"

using namespace quailora;

namespace quailora {
extern const Path amx_model;  // of amx_model.cpp
}

namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Small integers and their halves, exact in every dtype: sums of their products are exact in fp32, in any order.
float value_of(int64_t token, int64_t feature) { return static_cast<float>((token * 7 + feature * 5) % 9 - 4) / 2; }

void encode(float value, Dtype dtype, char* to) {
  const uint32_t bits = bits_of(value);
  if (dtype == Dtype::float32) return void(std::memcpy(to, &bits, 4));
  const uint32_t half = value == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112u << 10));
  const auto narrow = static_cast<uint16_t>(dtype == Dtype::bfloat16 ? bits >> 16 : half);
  std::memcpy(to, &narrow, 2);
}

void on_four_threads(int64_t units, const std::function<void(int64_t)>& unit) {
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < 4; ++first)
    threads.emplace_back([=, &unit] {
      for (int64_t i = first; i < units; i += 4) unit(i);
    });
  for (auto& thread : threads) thread.join();
}

void check(const Path& path, Dtype dtype, int64_t features, int64_t count, int64_t gap) {
  const int64_t size = dtype == Dtype::float32 ? 4 : 2, stride = features + gap;
  const int64_t values = count ? (count - 1) * stride + features : 0;
  std::vector<char> memory(values * size, '\xff');
  // It is exact at the end of a row; up to 7 bytes before one, which share 8 aligned bytes with it, become readable.
  ASAN_POISON_MEMORY_REGION(memory.data(), memory.size());
  std::vector<int64_t> kept, offsets;
  for (int64_t token = 0; token < count; ++token) {
    if (token % 5 == 3) continue;  // masked: left as NaN, and poisoned
    kept.push_back(token);
    offsets.push_back(token * stride);
    char* row = memory.data() + token * stride * size;
    ASAN_UNPOISON_MEMORY_REGION(row, features * size);
    for (int64_t f = 0; f < features; ++f) encode(value_of(token, f), dtype, row + f * size);
  }

  const int64_t h_stride = features + gap;
  std::vector<float> h((features - 1) * h_stride + features, 1);
  const Tokens tokens{memory.data(), dtype, features, offsets.data(), static_cast<int64_t>(offsets.size())};
  add_gram(tokens, path, on_four_threads, h.data(), h_stride);
  for (int64_t i = 0; i < features; ++i)
    for (int64_t j = 0; j < features; ++j) {
      double expected = 1;
      if (j <= i)
        for (const int64_t token : kept) expected += double{value_of(token, i)} * value_of(token, j);
      if (h[i * h_stride + j] != expected) {
        std::fprintf(stderr, "%s: dtype %d, %ld features, %ld tokens, H[%ld, %ld] is %g, not %g\n", path.name,
                     static_cast<int>(dtype), static_cast<long>(features), static_cast<long>(count),
                     static_cast<long>(i), static_cast<long>(j), h[i * h_stride + j], expected);
        std::exit(1);
      }
    }
}

// Features and tokens: none, few, and around a tile, the blocks and a chunk.
constexpr struct {
  int64_t features, count;
} kShapes[] = {{1, 0}, {1, 1}, {7, 2}, {95, 31}, {96, 130}, {97, 300}, {200, 65}, {33, 1300}};

}  // namespace

int main() {
  std::vector<const Path*> paths{&amx_model};
  for (const std::string& name : paths_here()) paths.push_back(&path_named(name));
  for (const Path* path : paths) {
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
      for (const auto [features, count] : kShapes)
        for (const int64_t gap : {0, 3}) check(*path, dtype, features, count, gap);
    std::printf("%s\n", path->name);
  }
}
