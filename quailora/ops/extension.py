"""The compiled extension `quailora._C`, where it was built: H accumulated by code made for this machine's processors.

It is loaded when first asked for, and declares the operator `torch.ops.quailora.gram_`.
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
    "the clone builds it, or says why not"
)


@cache
def _load() -> str | None:
    """Load the extension. Returns what is in the way, None if nothing is."""
    if importlib.util.find_spec("quailora._C") is None:
        return f"it was not built, so that H takes several times as long: {_HOW_TO_BUILD}"
    try:
        extension = importlib.import_module("quailora._C")
    except ImportError as error:
        return f"it does not load, as when it was built for another release of torch ({error}): {_HOW_TO_BUILD}"
    try:
        extension.use_cpu_path(os.environ.get("QUAILORA_CPU_PATH", ""))
    except ValueError as error:
        raise QuailoraError(str(error)) from error
    return None


def obstacle(device: torch.device) -> str | None:
    """Why the extension cannot serve tensors on `device`; None if it can.

    Raises QuailoraError if QUAILORA_CPU_PATH, which is read once, names a path that is not to be had here.
    """
    if reason := _load():
        return reason
    if device.type not in ("cpu", "cuda"):
        return f"it has no code for {device.type}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("quailora::gram_", device.type.upper()):
        return f"it was built without {device.type}; where CUDA_HOME names a toolkit, and {_HOW_TO_BUILD}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels are for compute capability 8.0 and later, {device} has less"
    return None


def gram_(h: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """h += tril(xᵀ x), as `reference.gram_`: h (n, n) fp32, x (..., n) bf16, fp16 or fp32, keep (...) bool.

    To be called where `obstacle` finds none. Rows that `keep` leaves out do not enter, whatever they hold. They are not
    even read, except where x has to be copied first: if the values of a row lie apart in memory, and on CUDA if its
    rows are not all evenly spaced, as those of x[:, :t] are not.
    What comes in one call is summed from zero, 1024 tokens at a time on CPUs, and then added. The number of threads
    changes no bit of it.
    On CPUs QUAILORA_CPU_PATH chooses among amx-bf16, avx512-bf16, avx512, avx2 and portable; by default it is the first
    of these that the processor has. Raises ValueError, with the values, for shapes, dtypes or devices that do not fit,
    and for an h that overlaps itself or x.
    """
    torch.ops.quailora.gram_(h, x, keep)
