// Any processor: vectors of 4 lanes, which all of x86-64 (SSE) and arm64 (NEON) have.
#include "fp32.h"
#include "rounding.h"

namespace quailora {

extern const Kernel portable_fp32;
const Kernel portable_fp32 = fp32_kernel<Fp32<4>>();
extern const ColumnKernel portable_columns;
const ColumnKernel portable_columns = column_kernel<4, 2, 4>();

const Path portable{"portable", [] { return true; }, &portable_fp32, &portable_fp32, &portable_columns};

}  // namespace quailora
