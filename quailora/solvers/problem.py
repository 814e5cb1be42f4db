"""What a solver is given and what it returns, and the algebra that all solvers share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quailora import ops
from quailora.solvers.error_matrix import ErrorMatrices

# Eigenvalues of S below this part of the largest are the square of fp32 rounding. (Rounding itself would be too much:
# one outlier channel 1000 times the others makes its own eigenvalue 1e6 times theirs.)
_NO_EIGENVALUE = (16 * torch.finfo(torch.float32).eps) ** 2

# Precise enough for whatever the objective is made of, to 1e-5, and for any product with H: an outlier channel hides
# the others from what is coarser.
FINE = "bf16x3"


@dataclass(frozen=True)
class Problem:
    """What a solver is given; lists are by linear. H is damped: H + shift · I, with `shift` apart to spare a copy."""

    errors: ErrorMatrices
    gram: Tensor | None  # None: H = I
    shift: float
    initial: list[float]  # the damped objective of A Bᵀ = 0
    error_norm: list[float]
    ranks: list[int]
    iterations: int
    seed: int

    def weigh(self, rights: Sequence[Tensor]) -> list[Tensor]:
        """H P, damped."""
        if self.gram is None:
            return list(rights)
        precision = "ieee" if self.errors.precision == "ieee" else FINE
        products = ops.grouped_gram_product(self.gram, rights, precision=precision)
        if not self.shift:
            return products
        return [p.add(right, alpha=self.shift) for p, right in zip(products, rights, strict=True)]

    def uncalibrated(self, iterations: int) -> "Problem":
        """With H = I: min 1/2 ‖E - A Bᵀ‖²_F."""
        halves = [norm**2 / 2 for norm in self.error_norm]
        return replace(self, gram=None, shift=0.0, initial=halves, iterations=iterations)


@dataclass(frozen=True)
class Solution:
    """What a solver returns for a linear: the factors as they come, and the products every objective is made of."""

    left: Tensor  # A (m, r)
    right: Tensor  # B (n, r)
    projected: Tensor  # Eᵀ A
    weighed: Tensor  # H B, damped
    trace: list[Tensor]
    jitter: Tensor | None = None  # NaN where none would do


def objective(initial: float, a: Tensor, projected: Tensor, b: Tensor, weighed: Tensor) -> Tensor:
    """1/2 tr(R H Rᵀ), R = E - A Bᵀ, given its value for R = E and the products Eᵀ A and H B: r × r algebra."""
    linear = (projected.double() * weighed.double()).sum()
    quadratic = (inner(a, a) * inner(b, weighed)).sum()
    return initial - linear + quadratic / 2


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Leftᵀ Right in fp64."""
    return left.double().T @ right.double()


def leading(values: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues; zero columns for those whose eigenvalue is only rounding."""
    values, vectors = values[-rank:], vectors[:, -rank:]
    return torch.where(values > _NO_EIGENVALUE * values[-1].clamp_min(0), vectors, 0.0)
