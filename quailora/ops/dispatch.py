"""Which backend serves each operation: the first one that runs on the device.

`reference.py` defines what the operations compute.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from quailora.ops import cpu, cpu_matmul, extension, reference, triton
from quailora.ops.reference import Columns, Error, Packed


@dataclass(frozen=True)
class Backend:
    """An implementation of an operation. `obstacle(device)` says why it cannot serve tensors there; None if it can."""

    name: str
    implementation: Callable[..., Any]
    obstacle: Callable[[torch.device], str | None] = lambda device: None


@dataclass(frozen=True)
class Service:
    """The backend that serves an operation, and why each of the others does not."""

    backend: str
    others: dict[str, str]


def _triton(operation: str) -> tuple[Backend, Backend]:
    """Triton where it runs, otherwise the reference."""
    return Backend("triton", getattr(triton, operation), triton.obstacle), _reference(operation)


def _reference(operation: str) -> Backend:
    return Backend("reference", getattr(reference, operation))


# Operation -> its backends, the preferred one first.
_BACKENDS: dict[str, tuple[Backend, ...]] = {
    "gram_": (Backend("extension", extension.gram_, extension.obstacle), _reference("gram_")),
    "mirror_": (_reference("mirror_"),),
    "gram_energy": (_reference("gram_energy"),),
    "grouped_orthonormalize": (
        *_triton("grouped_orthonormalize")[:1],
        Backend("lapack", cpu.grouped_orthonormalize, cpu.obstacle),
        _reference("grouped_orthonormalize"),
    ),
    "quantize_columns": (
        Backend("extension", extension.quantize_columns, extension.columns_obstacle),
        *_triton("quantize_columns"),
    ),
    "choose_scales": (_reference("choose_scales"),),
    **{
        operation: _triton(operation)
        for operation in (
            "grouped_gram_product",
            "packed",
            "error",
            "grouped_error_product",
            "grouped_error_product_t",
            "cholesky_solve",
        )
    },
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
    """For each operation, which backend serves tensors on `device`, and why the others do not.

    device: None is CUDA if there is a CUDA device, else the CPU.
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
    # Triton launches on the current device, even if the tensors are on another.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _choose(operation, device).implementation(*arguments, **keywords)


def gram_(h: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """h += tril(xᵀ x) over the tokens where `keep` is true, in place."""
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
    """Solve positive definite systems. Returns the solutions and `info` for each system."""
    return _call("cholesky_solve", systems.device, systems, right_hand_sides)


def grouped_orthonormalize(ys: Sequence[Tensor], bases: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Orthonormal bases of what the columns of each y add to the span of its basis."""
    return _call("grouped_orthonormalize", ys[0].device, ys, bases)


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
    """Round columns of W one after the other, with the errors of those before fed back."""
    return _call(
        "quantize_columns", weight.device, weight, feedback, factor, importance, group=group, bits=bits,
        symmetric=symmetric, clips=clips, scales=scales, zeros=zeros, levels=levels,
    )  # fmt: skip


def choose_scales(
    target: Tensor, importance: Tensor, *, bits: int, symmetric: bool, clips: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The scale and the zero of each row, where rounding costs least."""
    return _call(
        "choose_scales", target.device, target, importance, bits=bits, symmetric=symmetric, clips=clips
    )  # fmt: skip


def packed(quantized: Packed) -> Any:
    """A quantized weight in the form that the operations on E take."""
    return _call("packed", quantized.codes.device, quantized)


def error(
    weight: Tensor, quantized: Any, *, out: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows `start` to `stop` of E = W - Q, dense."""
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
    """Within it, matrix products in bf16 and fp16, where `dtypes` has them, run on `device` in the fastest way."""
    with ExitStack() as stack:
        for dtype in cpu_matmul.NAMES.keys() & set(dtypes):
            stack.enter_context(_choose(f"{cpu_matmul.NAMES[dtype]}_products", device).implementation())
        yield
