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
        return list(torch._foreach_add(products, list(rights), alpha=self.shift))

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

    def products(self) -> list[Tensor]:
        """What the objective and the balance are computed from, (r, r) fp64: Aᵀ A, Pᵀ H B, Bᵀ H B, Pᵀ B, Bᵀ B with
        P = Eᵀ A."""
        a, b, gram_right = self.left.double(), self.right.double(), self.gram_right.double()
        damped_square, square = b.T @ gram_right, b.T @ b
        damped_linear, linear = damped_square, square
        if self.projected is not self.right:
            p = self.projected.double()
            damped_linear, linear = p.T @ gram_right, p.T @ b
        return [a.T @ a, damped_linear, damped_square, linear, square]


def objective(initial: float, gram_left: Tensor, linear: Tensor, square: Tensor) -> Tensor:
    """1/2 tr(R H Rᵀ) for R = E - A Bᵀ, from its value `initial` for R = E and the products Aᵀ A, (Eᵀ A)ᵀ H B and Bᵀ H B
    (r, r)."""
    return initial - linear.trace() + (gram_left * square).sum() / 2


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Leftᵀ Right in fp64."""
    return left.double().T @ right.double()


def leading(values: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues (in ascending order, as `eigh` returns them).

    A column is zero where the eigenvalue is nothing but rounding.
    """
    values, vectors = values[-rank:], vectors[:, -rank:]
    return torch.where(values > _ZERO_EIGENVALUE * values[-1].clamp_min(0), vectors, 0.0)


def to_host(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Small matrices on the host, by one transfer, for which it waits: what is done with a few hundred rows, it does
    several times as fast as a GPU."""
    flat = torch.cat([matrix.flatten() for matrix in matrices]).cpu()
    parts = flat.split([matrix.numel() for matrix in matrices])
    return [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]


def to_floats(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalar tensors on one device. Here the host waits for it, and in `to_host`, and nowhere else."""
    return torch.stack([scalar.double() for scalar in scalars]).tolist()
