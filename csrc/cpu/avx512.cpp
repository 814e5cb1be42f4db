// AVX-512: 32 registers of 16 lanes.
#include "x86.h"

#ifdef QUAILORA_X86
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "fp32.h"

namespace quailora {
namespace {
constexpr Kernel kKernel = fp32_kernel<Fp32<16>>();
}
TARGET_END

extern const Kernel avx512_fp32;
const Kernel avx512_fp32 = kKernel;

const Path avx512{"avx512",
                  [] {
                    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
                  },
                  &avx512_fp32, &avx512_fp32};

}  // namespace quailora
#endif
