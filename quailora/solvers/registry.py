"""The solvers by name.

To add one, write a file beside this one with a function `Problem -> list[Solution]`, and add a line to `SOLVERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from quailora.solvers.als import als
from quailora.solvers.closed_form import eigh
from quailora.solvers.krylov import krylov
from quailora.solvers.problem import FINE, Problem, Solution
from quailora.solvers.svd import SVD_DEPTH, SVD_ENOUGH, svd


@dataclass(frozen=True)
class Solver:
    """How a solver is run, and what a plan must know of it.

    run: the solver.
    iterations: the default; None: it does not iterate.
    precision: of products with E on a GPU: the coarsest that costs no layer 0.01 % of its objective.
    products: the number of products with E, given the number of iterations.
    blocks: how many blocks of r columns it keeps at once, given the number of iterations.
    uses_gram: whether the full H decides; a solver that minimizes something else has work to do where tr(E H Eᵀ) is 0.
    dense: whether it makes matrices as large as E and H, in fp64.
    enough: with the default iterations, it stops where one takes less than this part off what is left; 0: it does not.
    """

    run: Callable[[Problem], list[Solution]]
    iterations: int | None
    precision: str
    products: Callable[[int], int]
    blocks: Callable[[int], int] = lambda steps: steps + 1
    uses_gram: bool = True
    dense: bool = False
    enough: float = 0.0


# Krylov orthonormalizes at each step, so tf32 does it no harm. als solves systems whose condition number can be 1e8,
# which amplifies the rounding of tf32 to many times the objective. Measured by benchmarks/kernels/precision.py.
SOLVERS = {
    "krylov": Solver(krylov, 3, "tf32", lambda depth: 2 * depth + 3, enough=1e-3),
    "als": Solver(als, 20, FINE, lambda steps: 2 * steps + 2 * SVD_DEPTH + 2, blocks=lambda _: SVD_DEPTH + 1),
    "eigh": Solver(eigh, None, "ieee", lambda _: 1, dense=True),
    "svd": Solver(svd, SVD_DEPTH, "tf32", lambda depth: 2 * depth + 3, uses_gram=False, enough=SVD_ENOUGH),
}
