"""The solvers by name. To add one: a file beside this one with a function
`Problem -> list[Solution]`, and a line here."""

from collections.abc import Callable
from dataclasses import dataclass

from quailora.solvers.als import als
from quailora.solvers.closed_form import eigh
from quailora.solvers.krylov import krylov
from quailora.solvers.problem import FINE, Problem, Solution
from quailora.solvers.svd import SVD_DEPTH, svd


@dataclass(frozen=True)
class Solver:
    run: Callable[[Problem], list[Solution]]
    iterations: int | None  # unless told; None: it makes none
    precision: str  # of products with E, on a GPU: the coarsest that costs no layer 0.01 % of its objective
    products: Callable[[int], int]  # with E, in so many iterations


# Krylov makes its subspace orthonormal at each step, and then tf32 does it no harm. als divides by systems whose
# condition may be 1e8, which takes what tf32 rounds to many times the objective. By benchmarks/kernels/precision.py.
SOLVERS = {
    "krylov": Solver(krylov, 3, "tf32", lambda depth: 2 * depth + 3),
    "als": Solver(als, 20, FINE, lambda steps: 2 * steps + 2 * SVD_DEPTH + 2),
    "eigh": Solver(eigh, None, "ieee", lambda _: 1),
    "svd": Solver(svd, SVD_DEPTH, "tf32", lambda depth: 2 * depth + 3),
}
