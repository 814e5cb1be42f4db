"""The paper's alternation (arXiv 2410.14713, section 3), which is subspace iteration on S = E H Eᵀ.

The host waits for nothing while `_alternate` is running, so it can be captured in a CUDA graph.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quailora import ops
from quailora.solvers.krylov import krylov
from quailora.solvers.problem import FINE, Problem, Solution, inner, objective
from quailora.solvers.svd import SVD_DEPTH

# Jitter for systems that are not positive definite, relative to their diagonal: the first that will do is taken. In
# fp32 less than the second changes nothing; with more than the last the result is not that of the system.
JITTER = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def als(problem: Problem) -> list[Solution]:
    """The paper's: from the SVD of E, A := E H B (Bᵀ H B)⁻¹ and B := Eᵀ A (Aᵀ A)⁻¹ in turn, two products with E."""
    errors = problem.errors
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    projected: list[Tensor] = []
    for start in krylov(problem.uncalibrated(SVD_DEPTH), traced=False):  # A = U, B = V Σ
        balance = torch.linalg.vector_norm(start.right, dim=0).sqrt()
        lefts.append(start.left * balance)
        projected.append(start.right * balance)
        rights.append(start.right * torch.where(balance > 0, 1 / balance, 0.0))
    ladder = torch.tensor([*JITTER, math.nan], dtype=torch.float64, device=errors.device)
    needed = [torch.zeros_like(ladder[0]) for _ in lefts]
    weighed, traces = _alternate(problem, ladder, lefts, rights, projected, needed)
    if errors.coarse:
        projected = errors.transposed_times(lefts, FINE)
        traces[-1] = list(map(objective, problem.initial, lefts, projected, rights, weighed))
    parts = zip(lefts, rights, projected, weighed, zip(*traces, strict=True), needed, strict=True)
    return [Solution(a, b, ea, hb, list(trace), jitter) for a, b, ea, hb, trace, jitter in parts]


def _alternate(
    problem: Problem,
    ladder: Tensor,
    lefts: list[Tensor],
    rights: list[Tensor],
    projected: list[Tensor],
    needed: list[Tensor],
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The alternation: what each A, B and Eᵀ A become takes its place in the lists, so that the old are not in memory
    besides. Returns the damped H B, and the objectives at the start and after each step. The host waits for nothing.
    """
    errors = problem.errors
    weighed = problem.weigh(rights)
    traces = [list(map(objective, problem.initial, lefts, projected, rights, weighed))]
    for _ in range(problem.iterations):
        lefts[:] = _divide(errors.times(weighed), rights, weighed, ladder, needed)
        projected[:] = errors.transposed_times(lefts)
        rights[:] = _divide(projected, lefts, lefts, ladder, needed)
        weighed = problem.weigh(rights)
        traces.append(list(map(objective, problem.initial, lefts, projected, rights, weighed)))
    return weighed, traces


def _divide(
    numerators: Sequence[Tensor],
    thins: Sequence[Tensor],
    weighed: Sequence[Tensor],
    ladder: Tensor,
    needed: list[Tensor],
) -> list[Tensor]:
    """numerator (k, r) · (thinᵀ weighed)⁻¹ for each linear, with the least jitter of `ladder` that will do.

    `ladder` ends in NaN, for when none will. `needed` keeps the largest taken.

    Systems are scaled to a unit diagonal; a column of `thin` that is zero stays one.
    """
    quotients = []
    for i, (numerator, thin, other) in enumerate(zip(numerators, thins, weighed, strict=True)):
        system = inner(thin, other)
        system = (system + system.T) / 2
        system.diagonal().add_((thin == 0).all(dim=0).to(system.dtype))
        scale = system.diagonal().rsqrt()  # not finite where the diagonal is not positive, and so is the system
        system = scale[:, None] * system * scale
        identity = torch.eye(len(system), dtype=system.dtype, device=system.device)
        candidates = system + ladder[:-1, None, None] * identity
        _, infos = ops.cholesky_solve(candidates, candidates.new_ones(*candidates.shape[:-1], 1))
        failures = (infos != 0).long().cumprod(dim=0).sum()
        chosen = ladder.index_select(0, failures.view(1))
        solution, _ = ops.cholesky_solve(system + chosen * identity, scale[:, None] * numerator.to(system.dtype).T)
        quotients.append((scale[:, None] * solution).T.to(numerator.dtype))
        needed[i] = torch.maximum(needed[i], chosen[0])
    return quotients
