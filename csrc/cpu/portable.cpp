// Any processor: vectors of 4 lanes, which all of x86-64 (SSE) and arm64 (NEON) have.
#include "fp32.h"

namespace quailora {

extern const Kernel portable_fp32;
const Kernel portable_fp32 = fp32_kernel<Fp32<4>>();

const Path portable{"portable", [] { return true; }, &portable_fp32, &portable_fp32};

}  // namespace quailora
