"""How precisely a kernel multiplies: the options for every product with E or H, and the `dot` that implements them.

    ieee     fp32 multiplications, no tensor cores                      error 1.5e-7 against fp64
    bf16x3   either factor as a sum of two bf16, three tensor products         4e-6
    tf32     factors with 10 bits of mantissa                                  7e-4
    bf16     factors with  7 bits of mantissa                                  2.3e-3

Sums are fp32 throughout.
"""

import triton
import triton.language as tl

from quailora.ops.precision import PRECISIONS as PRECISIONS


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr):
    """sum + a b: (x, y) fp32 times (y, z) fp32, added to (x, z) fp32."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sum)
    elif PRECISION == "bf16x3":
        # Written out: not every version and target of Triton has it as an input_precision.
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)
        sum = tl.dot(a_low, b_high, sum)  # small terms first
        sum = tl.dot(a_high, b_low, sum)
        return tl.dot(a_high, b_high, sum)
    else:
        return tl.dot(a, b, sum, input_precision=PRECISION)
