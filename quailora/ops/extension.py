"""The compiled extension `quailora._C`, where it was built: H accumulated by code for this machine's processors.

It is loaded at first use, and then defines the operator `torch.ops.quailora.gram_`.
"""

import importlib
import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from quailora.errors import QuailoraError

_HOW_TO_BUILD = (
    "on Linux with a C++ compiler, `QUAILORA_EXT=1 pip install --no-build-isolation --no-deps --force-reinstall .` in "
    "a clone of the repository builds it, or says why it cannot"
)


@cache
def _load() -> str | None:
    """Load the extension. Returns why it cannot be loaded; None if it was."""
    if importlib.util.find_spec("quailora._C") is None:
        return f"it was not built, so H takes several times as long: {_HOW_TO_BUILD}"
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
