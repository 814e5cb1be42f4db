// AVX-512: 32 registers of 16 lanes.
#include "x86.h"

#ifdef QUAILORA_X86
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "fp32.h"
#include "rounding.h"

namespace quailora {
namespace {
constexpr Kernel kKernel = fp32_kernel<Fp32<16>>();
constexpr ColumnKernel kColumnKernel = column_kernel<16, 2, 8>();  // 16 sums of two vectors of errors
}
TARGET_END

extern const Kernel avx512_fp32;
const Kernel avx512_fp32 = kKernel;
extern const ColumnKernel avx512_columns;
const ColumnKernel avx512_columns = kColumnKernel;

const Path avx512{"avx512",
                  [] {
                    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
                  },
                  &avx512_fp32, &avx512_fp32, &avx512_columns};

}  // namespace quailora
#endif
