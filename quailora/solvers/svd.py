"""The uncalibrated baseline: the best approximation of E itself, by block Krylov on E Eᵀ."""

from dataclasses import replace

from quailora.solvers.krylov import krylov
from quailora.solvers.problem import Problem, Solution

# The depth of block Krylov on E Eᵀ, whose spectrum decays slowly: this reaches the best approximation of E to 1e-6 on
# every layer measured. It ends sooner where the last block took away less than SVD_ENOUGH of what is left.
SVD_DEPTH, SVD_ENOUGH = 8, 1e-6


def svd(problem: Problem) -> list[Solution]:
    """Minimize 1/2 ‖E - A Bᵀ‖²_F, the objective with H = I."""
    solutions = krylov(problem.uncalibrated())
    gram_rights = problem.apply_gram([solution.right for solution in solutions])
    return [replace(solution, gram_right=hb) for solution, hb in zip(solutions, gram_rights, strict=True)]
