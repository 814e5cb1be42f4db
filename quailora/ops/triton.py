"""The operations that Triton kernels (`quailora.kernels`) serve, with the signatures of `reference.py`.

Kernels are imported when first used, because Triton may not be installed.
"""

import importlib
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quailora.ops.reference import Columns, Error, Packed

# The most columns of a thin matrix that one launch takes.
_MAX_COLUMNS = 256

# Ampere is the first with bf16 tensor cores and asynchronous copies.
_MIN_CAPABILITY = (8, 0)


def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot serve tensors on `device`; None if they can."""
    if device.type != "cuda":
        return f"its kernels are for CUDA and ROCm devices, not for {device.type}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if torch.version.hip is not None:
        # On AMD's other targets Triton has no tf32 and the kernels overflow the registers, so only the targets that
        # the tests compile for are allowed.
        settings = _kernels("settings")
        tested = [target for target in settings.SHARED_BYTES if target.startswith("gfx")]
        if (target := settings.target_of(device)) not in tested:
            return f"its kernels are compiled and tested for {', '.join(tested)} only, and {device} is {target}"
    elif (capability := torch.cuda.get_device_capability(device)) < _MIN_CAPABILITY:
        return f"its kernels need sm_80 or later, and {device} is sm_{capability[0]}{capability[1]}"
    return _launcher_obstacle()


@cache
def _launcher_obstacle() -> str | None:
    """Why Triton cannot launch kernels; None if it can.

    Triton compiles its launcher at first use. Without a C compiler that fails, which should be known before a run
    rather than halfway through it.
    """
    try:
        importlib.import_module("triton.runtime").driver.active.utils  # noqa: B018
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(error).split())[:300]
        return f"Triton cannot launch kernels here; it needs a C compiler and Python's headers: {reason}"
    return None


def _kernels(name: str) -> Any:
    return importlib.import_module(f"quailora.kernels.{name}")


def packed(quantized: Packed) -> Any:
    return _kernels("error_products").Codes.of(quantized)


def error(
    weight: Tensor, quantized: Any, *, out: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    return _kernels("error_products").error(weight, quantized, out=out, start=start, stop=stop)


def grouped_error_product(errors: Sequence[Error], rights: Sequence[Tensor], *, precision: str) -> list[Tensor]:
    return _by_columns(_kernels("error_products").grouped_error_product, errors, rights, precision)


def grouped_error_product_t(errors: Sequence[Error], lefts: Sequence[Tensor], *, precision: str) -> list[Tensor]:
    return _by_columns(_kernels("error_products").grouped_error_product_t, errors, lefts, precision)


def _by_columns(
    product: Callable[..., list[Tensor]], errors: Sequence[Error], thins: Sequence[Tensor], precision: str
) -> list[Tensor]:
    """One launch for every `_MAX_COLUMNS` columns of the thin matrices."""
    pieces: list[list[Tensor]] = [[] for _ in errors]
    for start in range(0, max(thin.shape[1] for thin in thins), _MAX_COLUMNS):
        wide = [i for i, thin in enumerate(thins) if start < thin.shape[1]]
        chunks = [thins[i][:, start : start + _MAX_COLUMNS] for i in wide]
        for i, piece in zip(wide, product([errors[i] for i in wide], chunks, precision=precision), strict=True):
            pieces[i].append(piece)
    return [torch.cat(piece, dim=1) if len(piece) > 1 else piece[0] for piece in pieces]


def grouped_gram_product(h: Tensor, rights: Sequence[Tensor], *, precision: str) -> list[Tensor]:
    return _kernels("gram_product").grouped_gram_product(h, rights, precision=precision)


def cholesky_solve(systems: Tensor, right_hand_sides: Tensor) -> tuple[Tensor, Tensor]:
    solutions, info = _kernels("cholesky").cholesky_solve(systems.float(), right_hand_sides.float())
    return solutions.to(systems.dtype), info


def grouped_orthonormalize(ys: Sequence[Tensor], bases: Sequence[Tensor] | None = None) -> list[Tensor]:
    """As one batch, with rows and columns of zeros where they are not of one size: these change nothing."""
    kernel = _kernels("orthonormalize").orthonormalize
    done = [] if bases is None else [_stacked(bases)]
    for chunk in _stacked(ys).split(_MAX_COLUMNS, dim=2):
        done.append(kernel(chunk, torch.cat(done, dim=2) if done else None))
    new = done if bases is None else done[1:]
    batch = torch.cat(new, dim=2) if len(new) > 1 else new[0]
    return [q[: y.shape[0], : y.shape[1]] for q, y in zip(batch, ys, strict=True)]


def _stacked(thins: Sequence[Tensor]) -> Tensor:
    rows, columns = (max(sizes) for sizes in zip(*(thin.shape for thin in thins), strict=True))
    return torch.stack([_kernels("padding").padded(thin, rows, columns) for thin in thins])


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
    found = _kernels("quantize_columns").quantize_columns(
        weight, feedback, factor, importance, group=group, bits=bits, symmetric=symmetric, clips=clips, scales=scales,
        zeros=zeros, levels=levels,
    )  # fmt: skip
    return Columns(*found)
