"""An emulator of the PTX that Triton emits for sm_80: what a kernel does on an Ampere GPU, on a CPU without one.

It executes mma.sync, ldmatrix, cp.async, shuffles, barriers, divergent branches and predicates, and raises where the
device would be free to do anything: an access out of an argument's bounds or misaligned, a race between two warps or
blocks, a read of what cp.async has not delivered, a barrier that some threads never reach. Shared memory and registers
start as NaN. It counts instructions and bytes of global memory. There are no atomics, and lanes of one warp always step
together, so that a missing bar.warp.sync goes unseen. Approximate instructions (ex2.approx, div.full) are exact here.

    counters = ptx.run(variant, {"a_ptr": a, "m": 64, ...})         # a Variant of quailora.kernels, compiled for sm_80
    counters = ptx.execute(text, [a, 64], grid=(1, 1, 1), shared_bytes=0)   # any PTX
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from quailora.kernels.variants import Variant
from tests.helpers import aot

from .machine import Block, Counters, Deadlock, Divergence, Unsupported
from .memory import Bytes, EmulationError, GlobalMemory, Misaligned, OutOfBounds, Race
from .program import parse

__all__ = [
    "Counters", "Deadlock", "Divergence", "EmulationError", "Misaligned", "OutOfBounds", "Race", "Unsupported",
    "execute", "run",
]  # fmt: skip

Array = torch.Tensor | np.ndarray
Argument = Array | int | float

# A block of the kernels here takes some ten thousand steps; a loop that has lost its end is found within seconds.
STEP_LIMIT = 1_000_000


def run(
    variant: Variant,
    arguments: Mapping[str, Argument],
    grid: tuple[int, ...] | None = None,
    rewrite: Callable[[str], str] = lambda text: text,
) -> Counters:
    """Execute the variant's sm_80 form; the tensors among the arguments are read and written in place.

    `arguments` are named as the kernel's, without constexprs; `grid` defaults to the variant's own. `rewrite` may plant
    a fault in the PTX.
    """
    names = [name for name in variant.kernel.arg_names if name not in variant.constexprs]
    if set(names) != set(arguments):
        raise ValueError(f"{variant.name} takes {names}, got {list(arguments)}")
    for name in variant.attrs:
        value = arguments[name]
        if (_bytes(value).ctypes.data if isinstance(value, Array) else value) % 16:
            raise ValueError(f"{variant.name} is compiled for {name} divisible by 16, and it is not")
    if grid is None:
        grid = variant.grid({**arguments, **variant.constexprs})
    compiled = aot.compile_for(aot.TARGETS["sm_80"], variant)
    return execute(
        rewrite(compiled.asm["ptx"]), [arguments[name] for name in names], grid, compiled.metadata.shared, names
    )


def execute(
    text: str,
    arguments: Sequence[Argument],
    grid: tuple[int, ...],
    shared_bytes: int,
    names: Sequence[str] | None = None,
) -> Counters:
    """Execute the kernel in `text`; `names` are those of the arguments, for messages and counters."""
    program, memory, counters = parse(text), GlobalMemory(), Counters()
    names = names or [name for name, _ in program.parameters]
    parameters: dict[str, np.generic] = {}
    for i, (parameter, kind) in enumerate(program.parameters):
        value = arguments[i] if i < len(arguments) else 0  # Triton appends pointers to scratch memory, unused here
        if isinstance(value, Array):
            parameters[parameter] = np.uint64(memory.add(names[i], _bytes(value)))
        elif kind == "f32":
            parameters[parameter] = np.float32(value)
        else:
            bits = int(kind[1:])
            parameters[parameter] = np.dtype(f"u{bits // 8}").type(int(value) & (2**bits - 1))
    width, height, depth = (*grid, 1, 1)[:3]
    for z, y, x in itertools.product(range(depth), range(height), range(width)):
        block = Block(program, parameters, memory, shared_bytes, (x, y, z), (width, height, depth), counters)
        block.run(STEP_LIMIT)
    counters.bytes_read, counters.bytes_written = memory.bytes_read, memory.bytes_written
    counters.bytes_touched = memory.bytes_touched()
    return counters


def _bytes(value: Array) -> Bytes:
    """The memory of an array, from its first element to its last."""
    if isinstance(value, np.ndarray):
        return value.reshape(-1, copy=False).view(np.uint8)
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.detach().as_strided((last + 1,), (1,)).view(torch.uint8).numpy()
