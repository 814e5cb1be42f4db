"""The accelerated operations: one signature each, served by the first backend that can.

What an operation computes is said, and specified, in `reference.py`.
"""

import importlib
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from quailora.ops import cpu_matmul, extension, reference
from quailora.ops.reference import Error, Packed


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation. `obstacle(device)` says why it cannot serve tensors there; None if it can."""

    name: str
    implementation: Callable[..., Any]
    obstacle: Callable[[torch.device], str | None] = lambda device: None


@dataclass(frozen=True)
class Service:
    """Which backend serves an operation, and for each of the others why it does not."""

    backend: str
    others: dict[str, str]


# ---- Triton

# The widest thin matrix that the kernels take in one launch.
_WIDEST = 256

# bf16 on tensor cores, and asynchronous copies, are there from Ampere on.
_LEAST_CAPABILITY = (8, 0)


def _triton_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels are for CUDA and ROCm devices, not for {device.type}"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if torch.version.hip is not None:
        # Triton takes no tf32 for AMD's other targets, and their registers overflow: kernels are for what they are
        # compiled for in the tests.
        settings = _kernels("settings")
        tested = [target for target in settings.SHARED_BYTES if target.startswith("gfx")]
        if (target := settings.target_of(device)) not in tested:
            return f"its kernels are compiled and tested for {', '.join(tested)} only, and {device} is {target}"
    elif (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        return f"its kernels need sm_80 or later, and {device} is sm_{capability[0]}{capability[1]}"
    return _launcher_obstacle()


@cache
def _launcher_obstacle() -> str | None:
    """Why Triton cannot launch kernels; None if it can. What launches them it compiles when first asked, which would be
    in the midst of a run."""
    try:
        importlib.import_module("triton.runtime").driver.active.utils  # noqa: B018
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(error).split())[:300]
        return f"Triton cannot launch kernels here, for which it takes a C compiler and Python's headers: {reason}"
    return None


def _kernels(name: str) -> Any:
    """A module of kernels: imported when first used, for not everyone has Triton."""
    return importlib.import_module(f"quailora.kernels.{name}")


def _triton_error_product(name: str) -> Callable[..., list[Tensor]]:
    """The grouped product `name`, for thin matrices of any width."""

    def run(errors: Sequence[Error], thins: Sequence[Tensor], *, precision: str) -> list[Tensor]:
        product = getattr(_kernels("error_products"), name)
        pieces: list[list[Tensor]] = [[] for _ in errors]
        for start in range(0, max(thin.shape[1] for thin in thins), _WIDEST):
            wide = [i for i, thin in enumerate(thins) if start < thin.shape[1]]
            chunks = [thins[i][:, start : start + _WIDEST] for i in wide]
            for i, piece in zip(wide, product([errors[i] for i in wide], chunks, precision=precision), strict=True):
                pieces[i].append(piece)
        return [torch.cat(piece, dim=1) if len(piece) > 1 else piece[0] for piece in pieces]

    return run


def _triton_packed(quantized: Packed) -> Any:
    return _kernels("error_products").Codes.of(quantized)


def _triton_error(
    weight: Tensor, quantized: Any, *, out: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    return _kernels("error_products").error(weight, quantized, out=out, start=start, stop=stop)


def _triton_gram_product(h: Tensor, rights: Sequence[Tensor], *, precision: str) -> list[Tensor]:
    return _kernels("gram_product").grouped_gram_product(h, rights, precision=precision)


def _triton_cholesky_solve(systems: Tensor, right_hand_sides: Tensor) -> tuple[Tensor, Tensor]:
    solutions, info = _kernels("cholesky").cholesky_solve(systems.float(), right_hand_sides.float())
    return solutions.to(systems.dtype), info


def _triton_orthonormalize(y: Tensor, basis: Tensor | None = None) -> Tensor:
    orthonormalize = _kernels("orthonormalize").orthonormalize
    done: list[Tensor] = [] if basis is None else [basis]
    for chunk in y.split(_WIDEST, dim=1):
        done.append(orthonormalize(chunk, torch.cat(done, dim=1) if done else None))
    new = done if basis is None else done[1:]
    return torch.cat(new, dim=1) if len(new) > 1 else new[0]


def _triton(implementation: Callable[..., Any]) -> Backend:
    return Backend("triton", implementation, _triton_obstacle)


def _reference(implementation: Callable[..., Any]) -> Backend:
    return Backend("reference", implementation)


# ---- the registry

# Operation -> its backends, the preferred one first.
_BACKENDS: dict[str, tuple[Backend, ...]] = {
    "gram_": (Backend("extension", extension.gram_, extension.obstacle), _reference(reference.gram_)),
    "mirror_": (_reference(reference.mirror_),),
    "gram_energy": (_reference(reference.gram_energy),),
    "grouped_gram_product": (_triton(_triton_gram_product), _reference(reference.grouped_gram_product)),
    "packed": (_triton(_triton_packed), _reference(reference.packed)),
    "error": (_triton(_triton_error), _reference(reference.error)),
    "grouped_error_product": (
        _triton(_triton_error_product("grouped_error_product")),
        _reference(reference.grouped_error_product),
    ),
    "grouped_error_product_t": (
        _triton(_triton_error_product("grouped_error_product_t")),
        _reference(reference.grouped_error_product_t),
    ),
    "cholesky_solve": (_triton(_triton_cholesky_solve), _reference(reference.cholesky_solve)),
    "orthonormalize": (_triton(_triton_orthonormalize), _reference(reference.orthonormalize)),
    **{
        f"{name}_products": (
            Backend("torch", nullcontext, cpu_matmul.obstacle(dtype)),
            Backend("fp32", partial(cpu_matmul.Float32Products, dtype)),
        )
        for dtype, name in cpu_matmul.NAMES.items()
    },
}


@cache
def _choose(operation: str, device: torch.device) -> Backend:
    return next(backend for backend in _BACKENDS[operation] if backend.obstacle(device) is None)


def backends(device: torch.device | str | None = None) -> dict[str, Service]:
    """Which backend serves each operation, and why not the others, for tensors on `device`.

    By default that is CUDA if there is a CUDA device, else the CPU.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    services = {}
    for operation, candidates in _BACKENDS.items():
        chosen = _choose(operation, where)
        others = {
            other.name: other.obstacle(where) or f"{chosen.name} is preferred"
            for other in candidates
            if other is not chosen
        }
        services[operation] = Service(chosen.name, others)
    return services


def _call(operation: str, device: torch.device, *arguments: Any, **keywords: Any) -> Any:
    # Triton launches on the device that is current, wherever the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _choose(operation, device).implementation(*arguments, **keywords)


def gram_(h: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """h += tril(xᵀ x) over the tokens that `keep` admits, in place."""
    _call("gram_", h.device, h, x, keep)


def mirror_(h: Tensor) -> None:
    """Copy the lower triangle of h to the upper one, in place."""
    _call("mirror_", h.device, h)


def gram_energy(h: Tensor, rows: Tensor) -> Tensor:
    """tr(R H Rᵀ), an fp64 scalar."""
    return _call("gram_energy", h.device, h, rows)


def grouped_gram_product(h: Tensor, rights: Sequence[Tensor], *, precision: str = "ieee") -> list[Tensor]:
    """[H P₀, H P₁, ...]."""
    return _call("grouped_gram_product", h.device, h, rights, precision=precision)


def cholesky_solve(systems: Tensor, right_hand_sides: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions of positive definite systems, and `info` for each."""
    return _call("cholesky_solve", systems.device, systems, right_hand_sides)


def orthonormalize(y: Tensor, basis: Tensor | None = None) -> Tensor:
    """Orthonormal columns that span what y adds to the span of basis."""
    return _call("orthonormalize", y.device, y, basis)


def packed(quantized: Packed) -> Any:
    """A quantized weight as the operations on E take it."""
    return _call("packed", quantized.codes.device, quantized)


def error(
    weight: Tensor, quantized: Any, *, out: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows of E = W - Q, dense."""
    return _call("error", weight.device, weight, quantized, out=out, start=start, stop=stop)


def grouped_error_product(
    errors: Sequence[Error], rights: Sequence[Tensor], *, precision: str = "ieee"
) -> list[Tensor]:
    """[E₀ P₀, E₁ P₁, ...]."""
    return _call("grouped_error_product", rights[0].device, errors, rights, precision=precision)


def grouped_error_product_t(
    errors: Sequence[Error], lefts: Sequence[Tensor], *, precision: str = "ieee"
) -> list[Tensor]:
    """[E₀ᵀ A₀, E₁ᵀ A₁, ...]."""
    return _call("grouped_error_product_t", lefts[0].device, errors, lefts, precision=precision)


@contextmanager
def half_products(device: torch.device, dtypes: Iterable[torch.dtype]) -> Iterator[None]:
    """Within it, a model on `device` that computes in these `dtypes` makes its products in the fastest way there is."""
    with ExitStack() as stack:
        for dtype in cpu_matmul.NAMES.keys() & set(dtypes):
            stack.enter_context(_choose(f"{cpu_matmul.NAMES[dtype]}_products", device).implementation())
        yield
