"""A masked matrix product: a small kernel with tensor cores, shared memory and a pipeline, to prove the tools on."""

import triton
import triton.language as tl

from quailora.kernels.variants import Variant


@triton.jit
def product(
    a_ptr, b_ptr, c_ptr, m, n, k,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """C = A B with A (m × k), B (k × n), C (m × n) fp32, all row-major; one block of C per program."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        across = start + tl.arange(0, BLOCK_K)[None, :]
        down = start + tl.arange(0, BLOCK_K)[:, None]
        a = tl.load(a_ptr + rows * k + across, mask=(rows < m) & (across < k), other=0.0)
        b = tl.load(b_ptr + down * n + columns, mask=(down < k) & (columns < n), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(c_ptr + rows * n + columns, total, mask=(rows < m) & (columns < n))


def product_variant(
    dtype: str, precision: str = "ieee", num_warps: int = 4, num_stages: int = 3, block: int = 32, aligned: bool = True
) -> Variant:
    """`dtype` is Triton's name; with `aligned`, n and k are divisible by 16."""
    return Variant(
        name=f"product-{dtype}-{precision}-{num_warps}-warps-{num_stages}-stages",
        kernel=product,
        signature={"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": "*fp32", "m": "i32", "n": "i32", "k": "i32"},
        constexprs={"PRECISION": precision, "BLOCK_M": block, "BLOCK_N": block, "BLOCK_K": 32},
        attrs=("a_ptr", "b_ptr", "c_ptr", *(("n", "k") if aligned else ())),
        num_warps=num_warps,
        num_stages=num_stages,
        uses_tensor_cores=True,
        grid=lambda call: (triton.cdiv(call["m"], call["BLOCK_M"]), triton.cdiv(call["n"], call["BLOCK_N"])),
        uses_wide_loads=aligned,
    )
