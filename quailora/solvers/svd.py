"""The uncalibrated baseline: the best approximation of E itself, by block Krylov on E Eᵀ."""

from dataclasses import replace

from quailora.solvers.krylov import krylov
from quailora.solvers.problem import Problem, Solution

# Of block Krylov on E Eᵀ, whose spectrum falls slowly: the best approximation of E to 1e-6 on every layer measured.
SVD_DEPTH = 8


def svd(problem: Problem) -> list[Solution]:
    """The uncalibrated objective 1/2 ‖E - A Bᵀ‖²_F, which is (1) with H = I."""
    solutions = krylov(problem.uncalibrated(problem.iterations))
    weighed = problem.weigh([solution.right for solution in solutions])
    return [replace(solution, weighed=hb) for solution, hb in zip(solutions, weighed, strict=True)]
