// AVX-512 with vdpbf16ps: two bf16 products added to each of 16 fp32 lanes.
//
// The instruction treats subnormals as zero, which loses nothing that counts: below 1e-38 a bf16 has no square in fp32.
#include "x86.h"

#ifdef QUAILORA_AVX512_BF16
#include <cpuid.h>

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "pairs.h"
#include "registers.h"

namespace quailora {
namespace {

constexpr int64_t kBlock = 256;  // a panel of 48 columns is then 24 KiB, half of the first cache
constexpr int64_t kPairs = kBlock / 2;

struct Pairs {
  static constexpr int kLanes = 16, kTokens = 2;
  using Element = uint32_t;
  using Vector = __m512;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector plus(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static __m512i load(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static Vector multiply_add(uint32_t row, __m512i columns, Vector sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(static_cast<int>(row)), (__m512bh)columns);
  }
  static void add_to(float* sum, Vector v) { _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), v)); }
};

void pack(const Tokens& tokens, int64_t first, int64_t count, int64_t feature, void* brick) {
  constexpr int64_t panel = kPanel<Pairs>;
  auto* out = static_cast<uint32_t*>(brick);
  for_each_pair(tokens, first, count, feature, (count + 1) / 2, [&](int64_t pair, const uint32_t* values) {
    for (int64_t p = 0; p < kTile; p += panel)
      std::memcpy(out + p * kPairs + pair * panel, values + p, panel * sizeof(uint32_t));
  });
}

void multiply(const void* rows, const void* columns, int64_t count, bool diagonal, float* sum) {
  multiply_panels<Pairs>(rows, columns, kPairs, (count + 1) / 2, diagonal, sum);
}

constexpr Kernel kKernel{kBlock, kPairs * kTile * static_cast<int64_t>(sizeof(uint32_t)), pack, multiply};

}  // namespace
TARGET_END

namespace {

// By hand: not every compiler that has the instruction has its name in __builtin_cpu_supports.
bool runs() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 5;  // of leaf 7, subleaf 1, eax
  return avx512.runs_here() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & kBf16;
}

}  // namespace

extern const Kernel avx512_fp32;
extern const ColumnKernel avx512_columns;

const Path avx512_bf16{"avx512-bf16", runs, &kKernel, &avx512_fp32, &avx512_columns};

}  // namespace quailora
#endif
