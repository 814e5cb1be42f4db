// The AMX kernel of csrc/cpu/amx.h on a model of the tile registers in plain C++, so that it runs on any processor. Slow.
// Tests compile it with gram.cpp and portable.cpp into a library of their own.
//
// What the instructions do is from Intel's "Instruction Set Extensions Programming Reference", TDPBF16PS.
#include "amx.h"

#include <cstdlib>
#include <thread>

namespace quailora {
namespace {

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

struct Tiles {
  struct Register {
    char row[16][64];
  };
  static inline thread_local Register tiles[8];
  static inline thread_local bool configured = false;

  // On the processor an instruction on tiles that were not configured is illegal.
  static char* row(int tile, int i) {
    if (!configured) std::abort();
    return tiles[tile].row[i];
  }
  static void configure() {
    configured = true;
    std::memset(tiles, 0, sizeof tiles);
  }
  static void release() { configured = false; }
  template <int kTo>
  static void load(const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(row(kTo, i), static_cast<const char*>(from) + i * stride, 64);
  }
  template <int kFrom>
  static void store(void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, row(kFrom, i), 64);
  }
  // For each pair, the products of its earlier tokens go to one sum and those of its later ones to another; both start
  // from zero, and their sum is added.
  template <int kSums, int kLeft, int kRight>
  static void multiply_add() {
    for (int m = 0; m < 16; ++m) {
      uint16_t left[32];
      std::memcpy(left, row(kLeft, m), sizeof left);
      float sums[16], earlier[16] = {}, later[16] = {};
      std::memcpy(sums, row(kSums, m), sizeof sums);
      for (int k = 0; k < 16; ++k) {
        uint16_t right[32];
        std::memcpy(right, row(kRight, k), sizeof right);
        for (int n = 0; n < 16; ++n) {
          earlier[n] += widen(left[2 * k]) * widen(right[2 * n]);
          later[n] += widen(left[2 * k + 1]) * widen(right[2 * n + 1]);
        }
      }
      for (int n = 0; n < 16; ++n) sums[n] += earlier[n] + later[n];
      std::memcpy(row(kSums, m), sums, sizeof sums);
    }
  }
};

constexpr Kernel kKernel = amx_kernel<Tiles>();

}  // namespace

extern const Kernel portable_fp32;
extern const ColumnKernel portable_columns;

extern const Path amx_model;
const Path amx_model{"amx-model", [] { return true; }, &kKernel, &portable_fp32, &portable_columns};

}  // namespace quailora

// h += tril(Xᵀ X), with the arguments of `add_gram`. `dtype` is the place in the enum.
extern "C" void amx_model_gram(const void* data, int dtype, int64_t features, const int64_t* offsets, int64_t count,
                               int threads, float* h, int64_t stride) {
  const quailora::Tokens tokens{data, static_cast<quailora::Dtype>(dtype), features, offsets, count};
  const auto parallel = [threads](int64_t units, const std::function<void(int64_t)>& unit) {
    std::vector<std::thread> workers;
    for (int64_t first = 0; first < threads; ++first)
      workers.emplace_back([=, &unit] {
        for (int64_t i = first; i < units; i += threads) unit(i);
      });
    for (auto& worker : workers) worker.join();
  };
  quailora::add_gram(tokens, quailora::amx_model, parallel, h, stride);
}
