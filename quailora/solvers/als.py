"""The paper's alternation (arXiv 2410.14713, section 3), which is subspace iteration on S = E H Eᵀ.

The host never waits for the device in `_alternate`, so it can be captured in a CUDA graph.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quailora import ops
from quailora.solvers.krylov import krylov
from quailora.solvers.problem import FINE, Problem, Solution, inner, objective
from quailora.solvers.svd import SVD_DEPTH, SVD_ENOUGH

# Jitter for systems that are not positive definite, relative to their diagonal; the smallest that is enough is added.
# Below the second value it changes nothing in fp32; above the last the solution is no longer that of the system.
JITTER = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def als(problem: Problem) -> list[Solution]:
    """From the SVD of E, A := E H B (Bᵀ H B)⁻¹ and B := Eᵀ A (Aᵀ A)⁻¹ in turn: two products with E per iteration."""
    errors = problem.errors
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    projected: list[Tensor] = []
    for start in krylov(replace(problem.uncalibrated(), iterations=SVD_DEPTH, enough=SVD_ENOUGH, traced=False)):
        # Up to a rotation, A = U and B = V Σ.
        balance = torch.linalg.vector_norm(start.right, dim=0).sqrt()
        lefts.append(start.left * balance)
        projected.append(start.right * balance)
        rights.append(start.right * torch.where(balance > 0, 1 / balance, 0.0))
    levels = torch.tensor([*JITTER, math.nan], dtype=torch.float64, device=errors.device)
    jitters = [torch.zeros_like(levels[0]) for _ in lefts]
    gram_rights, traces = _alternate(problem, levels, lefts, rights, projected, jitters)
    if errors.coarse:
        projected = errors.transposed_times(lefts, FINE)
    parts = zip(lefts, rights, projected, gram_rights, zip(*traces, strict=True), jitters, strict=True)
    return [Solution(a, b, ea, hb, list(trace), jitter, orthonormal=False) for a, b, ea, hb, trace, jitter in parts]


def _alternate(
    problem: Problem,
    levels: Tensor,
    lefts: list[Tensor],
    rights: list[Tensor],
    projected: list[Tensor],
    jitters: list[Tensor],
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The alternation, which updates A, B and Eᵀ A in their lists, so that the old ones are freed at once.

    Returns the damped H B, and the objectives at the end, if `traced` preceded by those at the start and at each step.
    """
    errors = problem.errors
    gram_rights = problem.apply_gram(rights)
    traces = []
    for _ in range(problem.iterations):
        if problem.traced:
            traces.append(_objectives(problem, lefts, rights, projected, gram_rights))
        lefts[:] = _solve_systems(errors.times(gram_rights), rights, gram_rights, levels, jitters)
        projected[:] = errors.transposed_times(lefts)
        rights[:] = _solve_systems(projected, lefts, lefts, levels, jitters)
        gram_rights = problem.apply_gram(rights)
    traces.append(_objectives(problem, lefts, rights, projected, gram_rights))
    return gram_rights, traces


def _objectives(problem: Problem, *parts: Sequence[Tensor]) -> list[Tensor]:
    solutions = [Solution(a, b, ea, hb, []) for a, b, ea, hb in zip(*parts, strict=True)]
    starts = zip(problem.initial, solutions, strict=True)
    return [objective(start, *solution.products()[:3]) for start, solution in starts]


def _solve_systems(
    numerators: Sequence[Tensor],
    thins: Sequence[Tensor],
    others: Sequence[Tensor],
    levels: Tensor,
    jitters: list[Tensor],
) -> list[Tensor]:
    """numerator (k, r) · (thinᵀ other)⁻¹ for each layer, with the smallest jitter of `levels` that is enough.

    `levels` ends in NaN, which is taken if none is enough. `jitters` keeps the largest taken so far.

    Systems are scaled to a unit diagonal. A column of `thin` that is zero gives a zero column.
    """
    quotients = []
    for i, (numerator, thin, other) in enumerate(zip(numerators, thins, others, strict=True)):
        system = inner(thin, other)
        system = (system + system.T) / 2
        system.diagonal().add_((thin == 0).all(dim=0).to(system.dtype))
        scale = system.diagonal().rsqrt()  # not finite where the diagonal is not positive; nor is the scaled system
        system = scale[:, None] * system * scale
        identity = torch.eye(len(system), dtype=system.dtype, device=system.device)
        candidates = system + levels[:-1, None, None] * identity
        _, infos = ops.cholesky_solve(candidates, candidates.new_ones(*candidates.shape[:-1], 1))
        failures = (infos != 0).long().cumprod(dim=0).sum()
        chosen = levels.index_select(0, failures.view(1))
        solution, _ = ops.cholesky_solve(system + chosen * identity, scale[:, None] * numerator.to(system.dtype).T)
        quotients.append((scale[:, None] * solution).T.to(numerator.dtype))
        jitters[i] = torch.maximum(jitters[i], chosen[0])
    return quotients
