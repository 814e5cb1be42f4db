"""The accelerated operations: one signature each, served by the first backend that can.

What an operation computes is said, and specified, in `reference.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quailora import reference
from quailora.reference import Dequantizable


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


# Operation -> its backends, the preferred one first.
_BACKENDS: dict[str, tuple[Backend, ...]] = {
    "gram_": (Backend("reference", reference.gram_),),
    "mirror_": (Backend("reference", reference.mirror_),),
    "gram_product": (Backend("reference", reference.gram_product),),
    "gram_energy": (Backend("reference", reference.gram_energy),),
    "error": (Backend("reference", reference.error),),
    "error_product": (Backend("reference", reference.error_product),),
    "error_product_t": (Backend("reference", reference.error_product_t),),
    "cholesky_solve": (Backend("reference", reference.cholesky_solve),),
    "orthonormalize": (Backend("reference", reference.orthonormalize),),
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


def gram_(h: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """h += tril(xᵀ x) over the tokens that `keep` admits, in place."""
    _choose("gram_", h.device).implementation(h, x, keep)


def mirror_(h: Tensor) -> None:
    """Copy the lower triangle of h to the upper one, in place."""
    _choose("mirror_", h.device).implementation(h)


def gram_product(h: Tensor, right: Tensor) -> Tensor:
    """H P."""
    return _choose("gram_product", h.device).implementation(h, right)


def gram_energy(h: Tensor, rows: Tensor) -> Tensor:
    """tr(R H Rᵀ), an fp64 scalar."""
    return _choose("gram_energy", h.device).implementation(h, rows)


def error(weight: Tensor, quantized: Tensor | Dequantizable) -> Tensor:
    """E = W - Q, dense."""
    return _choose("error", weight.device).implementation(weight, quantized)


def error_product(error: Tensor, right: Tensor) -> Tensor:
    """E P."""
    return _choose("error_product", right.device).implementation(error, right)


def error_product_t(error: Tensor, left: Tensor) -> Tensor:
    """Eᵀ A."""
    return _choose("error_product_t", left.device).implementation(error, left)


def cholesky_solve(systems: Tensor, right_hand_sides: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions of positive definite systems, and `info` for each."""
    return _choose("cholesky_solve", systems.device).implementation(systems, right_hand_sides)


def orthonormalize(y: Tensor, basis: Tensor | None = None) -> Tensor:
    """Orthonormal columns that span what y adds to the span of basis."""
    return _choose("orthonormalize", y.device).implementation(y, basis)


class ErrorMatrix:
    """E = W - Q as a solver sees it: an (m, n) operator on thin matrices. How its products are made is decided here.

    `products` counts them: each is one pass over E, which is what a solve costs on a GPU.
    """

    def __init__(self, weight: Tensor, quantized: Tensor | Dequantizable) -> None:
        self._error = error(weight, quantized)
        self.shape = self._error.shape
        self.device = self._error.device
        self.products = 0

    def times(self, right: Tensor) -> Tensor:
        """E P: (n, k) -> (m, k)."""
        self.products += 1
        return error_product(self._error, right)

    def transposed_times(self, left: Tensor) -> Tensor:
        """Eᵀ A: (m, k) -> (n, k)."""
        self.products += 1
        return error_product_t(self._error, left)

    def dense(self) -> Tensor:
        """E itself, (m, n) fp32: not to be written to."""
        return self._error
