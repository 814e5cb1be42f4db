"""What a solver is given and what it returns, and the algebra that all solvers share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quailora import ops
from quailora.solvers.error_matrix import ErrorMatrices

# An eigenvalue of S below this fraction of the largest is taken for rounding: the square of what fp32 rounding leaves.
# (Rounding itself would be too high a threshold: where one channel is 1000 times as large as the others, the largest
# eigenvalue is 1e6 times theirs.)
_ZERO_EIGENVALUE = (16 * torch.finfo(torch.float32).eps) ** 2

# The precision of products that enter the objective, accurate to 1e-5, and of every product with H: in anything coarser
# one outlier channel hides the others.
FINE = "bf16x3"


@dataclass(frozen=True)
class Problem:
    """Linear layers that share an input, as a solver gets them; lists are by layer.

    H is damped: H + shift · I. `shift` stands apart so that H need not be copied.
    """

    errors: ErrorMatrices
    gram: Tensor | None  # H (n, n) fp32; None is the identity
    shift: float
    initial: list[float]  # the damped objective at A Bᵀ = 0
    error_norm: list[float]  # ‖E‖_F
    ranks: list[int]
    iterations: int
    seed: int
    enough: float = 0.0  # stop where an iteration takes less than this part off what is left; 0: do not
    traced: bool = False  # whether to report the objective after each iteration

    def apply_gram(self, rights: Sequence[Tensor]) -> list[Tensor]:
        """[H P, ...] with the damped H, each (n, k) -> (n, k)."""
        if self.gram is None:
            return list(rights)
        precision = "ieee" if self.errors.precision == "ieee" else FINE
        products = ops.grouped_gram_product(self.gram, rights, precision=precision)
        if not self.shift:
            return products
        return [p.add(right, alpha=self.shift) for p, right in zip(products, rights, strict=True)]

    def uncalibrated(self) -> "Problem":
        """The same with H = I: minimize 1/2 ‖E - A Bᵀ‖²_F."""
        return replace(self, gram=None, shift=0.0, initial=[norm**2 / 2 for norm in self.error_norm])


@dataclass(frozen=True)
class Solution:
    """What a solver returns for a layer: unbalanced factors, and the products that the objective is computed from."""

    left: Tensor  # A (m, r)
    right: Tensor  # B (n, r)
    projected: Tensor  # Eᵀ A (n, r)
    gram_right: Tensor  # H B (n, r), damped
    trace: list[Tensor]  # the damped objective, if `traced` at the start and after each iteration
    jitter: Tensor | None = None  # what `als` added to its systems; NaN if nothing it tried was enough
    orthonormal: bool = True  # the columns of A, but for those that are zero


def objective(
    initial: float, a: Tensor, projected: Tensor, b: Tensor, gram_right: Tensor, gram_left: Tensor | None = None
) -> Tensor:
    """1/2 tr(R H Rᵀ) for R = E - A Bᵀ, from its value `initial` for R = E and the products Eᵀ A, H B and Aᵀ A."""
    gram_left = inner(a, a) if gram_left is None else gram_left
    between = inner(b, gram_right)
    linear = between.trace() if projected is b else (projected.double() * gram_right.double()).sum()
    return initial - linear + (gram_left * between).sum() / 2


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Leftᵀ Right in fp64."""
    return left.double().T @ right.double()


def leading(values: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues (in ascending order, as `eigh` returns them).

    A column is zero where the eigenvalue is nothing but rounding.
    """
    values, vectors = values[-rank:], vectors[:, -rank:]
    return torch.where(values > _ZERO_EIGENVALUE * values[-1].clamp_min(0), vectors, 0.0)


def small_eigh(systems: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues (k,) and -vectors (k, k) of symmetric fp64 matrices (k, k), of which the lower triangle is read.

    By the host's LAPACK: for a few hundred rows, a GPU takes several times as long. One transfer there and one back.
    """
    if not systems or systems[0].device.type == "cpu":
        return [tuple(torch.linalg.eigh(system)) for system in systems]
    sizes = [len(system) for system in systems]
    flat = torch.cat([system.flatten() for system in systems]).cpu().split([size**2 for size in sizes])
    solved = [torch.linalg.eigh(part.view(size, size)) for part, size in zip(flat, sizes, strict=True)]
    back = torch.cat([torch.cat([values[None], vectors]).flatten() for values, vectors in solved])
    parts = back.to(systems[0].device).split([(size + 1) * size for size in sizes])
    found = [part.view(size + 1, size) for part, size in zip(parts, sizes, strict=True)]
    return [(each[0], each[1:]) for each in found]


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalar tensors. This is where the host waits for the device, and the only place."""
    return torch.stack([scalar.double() for scalar in scalars]).tolist()
