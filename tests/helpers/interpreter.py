"""Triton's interpreter (TRITON_INTERPRET=1), made to compute what a GPU computes.

As of Triton 3.9 it truncates casts to bf16, works on the raw bits of bf16 values, takes no notice of `input_precision`
and accepts dots that no tensor core takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_plain_cast = _Builder.cast_impl
_plain_binary = _Builder.binary_op
_plain_dot = _Builder.create_dot


def install() -> None:
    """Patch the interpreter of this process. Needs TRITON_INTERPRET=1 from before Triton was imported."""
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET must be 1 when Triton is imported"
    _Builder.cast_impl = _cast
    _Builder.create_fp_to_fp = lambda self, source, target, rounding: _cast(self, source, target)
    _Builder.binary_op = _binary
    _Builder.create_dot = _dot
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = _min_dot_size


@contextmanager
def only(*program: int) -> Iterator[None]:
    """Within it a launch runs one program of its grid: the way to the far end of a matrix too large to walk through."""
    builder, launch = interpreter.interpreter_builder, interpreter.GridExecutor.__call__

    def launch_one(self: Any, *arguments: Any, **keywords: Any) -> None:
        grid, self.grid = (*self.grid, 1, 1)[:3], (1, 1, 1)
        builder.set_grid_dim = lambda *_: _Builder.set_grid_dim(builder, *grid)
        builder.set_grid_idx = lambda *_: _Builder.set_grid_idx(builder, *(*program, 0, 0)[:3])
        try:
            launch(self, *arguments, **keywords)
        finally:
            del builder.set_grid_dim, builder.set_grid_idx

    interpreter.GridExecutor.__call__ = launch_one
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = launch


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _cast(self: Any, source: Any, target: Any) -> Any:
    before, after = source.dtype.scalar, target.scalar
    if before == after == tl.bfloat16:
        return _Handle(source.data, after)
    if before == tl.bfloat16:
        return _cast(self, _Handle(_from_bf16(source.data), tl.float32), target)
    if after == tl.bfloat16:
        return _Handle(_to_bf16(_plain_cast(self, source, tl.float32).data), after)
    return _plain_cast(self, source, target)


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    if left.dtype.scalar != tl.bfloat16:
        return _plain_binary(self, left, right, operation)
    values = operation(_from_bf16(left.data), _from_bf16(right.data))
    return _Handle(values if values.dtype == np.bool_ else _to_bf16(values), tl.bfloat16)


def _tf32(values: np.ndarray) -> np.ndarray:
    # Truncated, as tensor cores do with what was not rounded before.
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _dot(self: Any, a: Any, b: Any, sum: Any, precision: Any, imprecise: Any) -> Any:
    left, right = a.data, b.data
    if a.dtype.scalar == tl.bfloat16:
        left, right = _from_bf16(left), _from_bf16(right)
    elif a.dtype.scalar == tl.float16:
        left, right = left.astype(np.float32), right.astype(np.float32)
    elif a.dtype.scalar == tl.float32:
        name = str(precision).rpartition(".")[2]
        if name == "TF32":
            left, right = _tf32(left), _tf32(right)
        elif name != "IEEE":
            raise NotImplementedError(f"input_precision {name}")
    else:
        return _plain_dot(self, a, b, sum, precision, imprecise)
    return _Handle(np.matmul(left, right, dtype=np.float32) + sum.data, sum.dtype.scalar)


def _min_dot_size(left: Any, right: Any) -> tuple[int, int, int]:
    """What nvidia's backend asks for: 256 bits of each row of the left factor."""
    return 1, 1, 256 // left.scalar.primitive_bitwidth
