// AVX2 with fused multiply-add: 16 registers of 8 lanes.
#include "x86.h"

#ifdef QUAILORA_X86
TARGET_BEGIN("avx2,fma")
#include "fp32.h"
#include "rounding.h"

namespace quailora {
namespace {
constexpr Kernel kKernel = fp32_kernel<Fp32<8>>();
constexpr ColumnKernel kColumnKernel = column_kernel<8, 2, 4>();
}
TARGET_END

const Path avx2{"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
                &kKernel, &kKernel, &kColumnKernel};

}  // namespace quailora
#endif
