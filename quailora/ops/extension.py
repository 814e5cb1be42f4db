"""The compiled extension `quailora._C`, where it was built: operations by code for this machine's processors.

It is loaded at first use, and then defines the operators `torch.ops.quailora.gram_` and `quantize_columns`.
"""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from quailora.errors import QuailoraError
from quailora.ops.reference import Columns

_HOW_TO_BUILD = (
    "on Linux with a C++ compiler, `QUAILORA_EXT=1 pip install --no-build-isolation --no-deps --force-reinstall .` in "
    "a clone of the repository builds it, or says why it cannot"
)


@cache
def _load() -> str | None:
    """Load the extension. Returns why it cannot be loaded; None if it was."""
    if importlib.util.find_spec("quailora._C") is None:
        return f"it was not built, so this takes several times as long: {_HOW_TO_BUILD}"
    try:
        extension = importlib.import_module("quailora._C")
    except ImportError as error:
        return f"it does not load; was it built for another release of torch? ({error}): {_HOW_TO_BUILD}"
    try:
        extension.use_cpu_path(os.environ.get("QUAILORA_CPU_PATH", ""))
    except ValueError as error:
        raise QuailoraError(str(error)) from error
    return None


def obstacle(device: torch.device) -> str | None:
    """Why the extension cannot serve tensors on `device`; None if it can.

    Raises QuailoraError if QUAILORA_CPU_PATH, which is read once, names a path that this CPU does not have.
    """
    if reason := _load():
        return reason
    if device.type not in ("cpu", "cuda"):
        return f"it has no code for {device.type}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("quailora::gram_", device.type.upper()):
        return f"it was built without {device.type}: with CUDA_HOME set to a toolkit, {_HOW_TO_BUILD}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need compute capability 8.0 or later, and {device} has less"
    return None


def columns_obstacle(device: torch.device) -> str | None:
    """Why `quantize_columns` cannot serve tensors on `device`; None if it can. Raises what `obstacle` raises."""
    if device.type != "cpu":
        return f"its code for this is for CPUs only, not for {device.type}"
    return obstacle(device)


def gram_(h: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """h += tril(xᵀ x), as `reference.gram_`: h (n, n) fp32, x (..., n) bf16, fp16 or fp32, keep (...) bool.

    Call it only where `obstacle` returns None. Rows that `keep` leaves out may hold anything. They are not even read,
    unless x must be copied first: if the values of a row are not adjacent in memory, and on CUDA if the rows are not
    evenly spaced, like those of x[:, :t].

    Each call is summed from zero (on CPUs, 1024 tokens at a time) and then added to h. The result has the same bits
    for any number of threads.

    On CPUs, QUAILORA_CPU_PATH chooses among amx-bf16, avx512-bf16, avx512, avx2 and portable; the default is the first
    of these that the processor has. Raises ValueError, with the values, for shapes, dtypes or devices that do not
    match, and for an h that overlaps itself or x.
    """
    torch.ops.quailora.gram_(h, x, keep)


def quantize_columns(
    weight: Tensor,
    feedback: Tensor,
    factor: Tensor,
    importance: Tensor,
    *,
    group: int,
    bits: int,
    symmetric: bool,
    clips: Sequence[float],
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    levels: Tensor | None = None,
) -> Columns:
    """Round columns of W one after the other, with the errors of those before fed back, as
    `reference.quantize_columns`. On CPUs only, by the path that `gram_` takes.

    Sums are in the order of the reference, but fused where the processor can, so that a value may come to lie on the
    other side of the middle between two levels. The result has the same bits for any number of threads. Matrices are
    read in place, if the values of a row are adjacent in memory. A row that holds a NaN, or whose scale fp16 cannot
    hold, gets the scale 0; no other row is affected. Raises ValueError, with the values, for shapes, dtypes or devices
    that do not match.
    """
    return Columns(
        *torch.ops.quailora.quantize_columns(
            weight, feedback, factor, importance, group=group, bits=bits, symmetric=symmetric, clips=clips,
            scales=scales, zeros=zeros, levels=levels,
        )
    )  # fmt: skip
