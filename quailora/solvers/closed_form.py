"""The optimum in closed form, in fp64: for checks, because it takes all of E and a full eigendecomposition."""

from dataclasses import replace

import torch

from quailora.solvers.problem import Problem, Solution, leading, objective


def eigh(problem: Problem) -> list[Solution]:
    """A = the top r eigenvectors of S = E H Eᵀ, B = Eᵀ A."""
    assert problem.gram is not None
    h, solutions = problem.gram.double(), []
    for i, rank in enumerate(problem.ranks):
        error = problem.errors.dense(i).double()
        rows, columns = error.shape
        span, core = torch.linalg.qr(error) if rows > columns else (None, error)  # the range of S is in that of E
        del error
        s = core @ (h @ core.T)
        s += (core @ core.T).mul_(problem.shift)
        values, vectors = torch.linalg.eigh((s + s.T).div_(2))
        vectors = leading(values, vectors, rank)
        left = vectors if span is None else span @ vectors
        right = core.T @ vectors
        gram_right = h @ right + problem.shift * right
        solution = Solution(left, right, right, gram_right, trace=[])
        solutions.append(replace(solution, trace=[objective(problem.initial[i], *solution.products()[:3])]))
    return solutions
