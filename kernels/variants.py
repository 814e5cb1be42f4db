"""One shipped configuration of a Triton kernel, described so that it can be compiled and executed without a GPU.

Every file with kernels exports `variants(target) -> Iterator[Variant]`: all the configurations that its launch code may
choose on a target of `settings.SHARED_BYTES`. The tests go through them: each is compiled, and some of sm_80's are run
on the CPU in their compiled form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with everything that its compiled form depends on, and how it is launched.

    `signature` and `constexprs` together name every argument of the kernel once. Types are Triton's: "*bf16", "i32",
    "fp32". `attrs` names the arguments that are always divisible by 16 (for a pointer: its address in bytes). Triton
    needs it for 16-byte loads; if it is not true, loads are out of bounds. `grid` takes all arguments by name,
    constexprs included, and returns one to three numbers of programs, as in a launch.
    """

    name: str  # unique in its file, fit for a test's name: "error_products-bf16-r64"
    kernel: triton.JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: tuple[str, ...]
    num_warps: int
    num_stages: int
    uses_tensor_cores: bool
    grid: Callable[[Mapping[str, Any]], tuple[int, ...]]
    maxnreg: int | None = None  # registers a thread may have, on NVIDIA; else the compiler decides
    uses_wide_loads: bool = True  # 16 bytes at a time from global memory; not where rows are ragged
