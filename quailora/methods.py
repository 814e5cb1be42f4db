"""The iterations that find factors: min over A, B of 1/2 tr(R H Rᵀ), R = E - A Bᵀ, E = W - Q (arXiv 2410.14713).

The optimum is A = the top r eigenvectors of S = E H Eᵀ and B = Eᵀ A (CLoQ, arXiv 2501.18475).

    krylov  block Krylov: nearest to the optimum for the fewest passes over E
    als     the paper's alternation, which is subspace iteration on S
    eigh    the closed form, in fp64: needs E in memory, and eigenvectors of an m x m or n x n matrix
    svd     ignores H: the best approximation of E itself, by block Krylov on E Eᵀ

Each solves for all linears that share an input, and so H, in step: H is read once for all of them. The host waits for
nothing while `_span` or `_alternate`, the loops of krylov and of als, is running, so either can be captured in a CUDA
graph. After them it waits for small matrices: krylov ends with an eigenproblem for each linear and, for the trace, with
one more for each step (`_ritz`); and factors are balanced by two QR decompositions and an SVD (`solvers.py`).

Whatever is r wide and small is fp64. Products with E and H are fp32 on a CPU; on a GPU as precise as they need to be:
see `METHODS`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quailora import ops
from quailora.error_matrices import ErrorMatrices

# Eigenvalues of S below this part of the largest are the square of fp32 rounding. (Rounding itself would be too much:
# one outlier channel 1000 times the others makes its own eigenvalue 1e6 times theirs.)
_NO_EIGENVALUE = (16 * torch.finfo(torch.float32).eps) ** 2

# Jitter for systems that are not positive definite, relative to their diagonal: the first that will do is taken. In
# fp32 less than the second changes nothing; with more than the last the result is not that of the system.
JITTER = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

# Precise enough for whatever the objective is made of, to 1e-5, and for any product with H: an outlier channel hides
# the others from what is coarser.
_FINE = "bf16x3"

# Of block Krylov on E Eᵀ, whose spectrum falls slowly: the best approximation of E to 1e-6 on every layer measured.
_SVD_DEPTH = 8


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
        precision = "ieee" if self.errors.precision == "ieee" else _FINE
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


# ---- krylov, and svd


def krylov(problem: Problem, traced: bool = True) -> list[Solution]:
    """Rayleigh-Ritz on the span of Y₀, S Y₀, S² Y₀, ..., where Y₀ = E H Ω with a Gaussian Ω.

    After Musco and Musco, arXiv 1504.05477. Products with E: 2 · depth + 2, and a precise one if those are coarse.
    """
    spans = _span(problem, [_draw(problem, i) for i in range(len(problem.ranks))])
    ritz = [_ritz(*each, traced) for each in zip(spans, problem.ranks, problem.initial, strict=True)]
    lefts = [span.basis @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
    traces = [trace for _, trace in ritz]
    if problem.errors.coarse:
        rights = problem.errors.transposed_times(lefts, _FINE)
        weighed = problem.weigh(rights)
        for trace, *products in zip(traces, problem.initial, lefts, rights, rights, weighed, strict=True):
            trace[-1] = objective(*products)
    else:
        rights = [span.projected @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
        weighed = [span.weighed @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
    return [Solution(a, b, b, hb, trace) for a, b, hb, trace in zip(lefts, rights, weighed, traces, strict=True)]


@dataclass(frozen=True)
class _Span:
    """A subspace, and what Rayleigh-Ritz needs of it."""

    basis: Tensor  # Y (m, k), orthonormal columns or zero
    projected: Tensor  # Eᵀ Y
    weighed: Tensor  # H Eᵀ Y, damped


def _draw(problem: Problem, index: int) -> tuple[Tensor, Tensor]:
    """Ω (n, r), and (m, r) to fill up with: drawn on the CPU, so that every device starts alike."""
    (rows, columns), rank = problem.errors.shapes[index], problem.ranks[index]
    generator = torch.Generator().manual_seed(problem.seed)
    start, filling = (torch.randn(size, rank, generator=generator) for size in (columns, rows))
    device = problem.errors.device
    return torch.empty_like(start, device=device).copy_(start), torch.empty_like(filling, device=device).copy_(filling)


def _span(problem: Problem, chance: Sequence[tuple[Tensor, Tensor]]) -> list[_Span]:
    """Nested subspaces, a block of r columns for each step. The host waits for nothing."""
    errors = problem.errors
    products = errors.times(problem.weigh([start for start, _ in chance]))
    blocks = [_fill(ops.orthonormalize(y), filling) for y, (_, filling) in zip(products, chance, strict=True)]
    # What each step adds to a _Span, by linear.
    spans: list[tuple[list[Tensor], ...]] = [([], [], []) for _ in blocks]
    for step in range(problem.iterations + 1):
        projected = errors.transposed_times(blocks)
        weighed = problem.weigh(projected)
        for span, *parts in zip(spans, blocks, projected, weighed, strict=True):
            for known, part in zip(span, parts, strict=True):
                known.append(part)
        if step == problem.iterations:
            break
        products = errors.times(weighed)
        blocks = [
            ops.orthonormalize(y, torch.cat(bases, dim=1)) for y, (bases, *_) in zip(products, spans, strict=True)
        ]
        # S maps the spans into themselves: its top eigenvectors are in there. Again, a GPU's host would have to wait.
        if errors.device.type == "cpu" and not any(block.any() for block in blocks):
            break
    del products, blocks, projected, weighed
    return [_Span(*map(_joined, span)) for span in spans]


def _joined(blocks: list[Tensor]) -> Tensor:
    """Side by side; `blocks` is emptied, so that they are not in memory besides."""
    joined = torch.cat(blocks, dim=1)
    blocks.clear()
    return joined


def _fill(block: Tensor, filling: Tensor) -> Tensor:
    """An outlier channel may drown the rest of the start in rounding: chance stands in for columns that are zero."""
    zero = (block == 0).all(dim=0)
    if block.device.type == "cpu" and not zero.any():  # which a GPU's host would have to wait for
        return block
    return torch.where(zero, ops.orthonormalize(filling, block), block)


def _ritz(span: _Span, rank: int, initial: float, traced: bool) -> tuple[Tensor, list[Tensor]]:
    """The top eigenvectors of S on the span, (k, r) fp32 in terms of its basis, and the objective they leave; before
    it, if `traced`, those of the smaller subspaces."""
    restricted = _inner(span.projected, span.weighed)
    restricted = (restricted + restricted.T) / 2
    values, vectors = torch.linalg.eigh(restricted)
    widths = range(rank, len(restricted), rank) if traced else ()
    smaller = [torch.linalg.eigvalsh(restricted[:k, :k]) for k in widths]
    trace = [initial - of_one[-rank:].clamp_min(0).sum() / 2 for of_one in (*smaller, values)]
    return _leading(values, vectors, rank).float(), trace


def svd(problem: Problem) -> list[Solution]:
    """The uncalibrated objective 1/2 ‖E - A Bᵀ‖²_F, which is (1) with H = I."""
    solutions = krylov(problem.uncalibrated(problem.iterations))
    weighed = problem.weigh([solution.right for solution in solutions])
    return [replace(solution, weighed=hb) for solution, hb in zip(solutions, weighed, strict=True)]


# ---- als


def als(problem: Problem) -> list[Solution]:
    """The paper's: from the SVD of E, A := E H B (Bᵀ H B)⁻¹ and B := Eᵀ A (Aᵀ A)⁻¹ in turn, two products with E."""
    errors = problem.errors
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    projected: list[Tensor] = []
    for start in krylov(problem.uncalibrated(_SVD_DEPTH), traced=False):  # A = U, B = V Σ
        balance = torch.linalg.vector_norm(start.right, dim=0).sqrt()
        lefts.append(start.left * balance)
        projected.append(start.right * balance)
        rights.append(start.right * torch.where(balance > 0, 1 / balance, 0.0))
    ladder = torch.tensor([*JITTER, math.nan], dtype=torch.float64, device=errors.device)
    needed = [torch.zeros_like(ladder[0]) for _ in lefts]
    weighed, traces = _alternate(problem, ladder, lefts, rights, projected, needed)
    if errors.coarse:
        projected = errors.transposed_times(lefts, _FINE)
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
        system = _inner(thin, other)
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


# ---- the others


def eigh(problem: Problem) -> list[Solution]:
    """The closed form: A = the top r eigenvectors of S = E H Eᵀ, B = Eᵀ A."""
    assert problem.gram is not None
    h, solutions = problem.gram.double(), []
    for i, rank in enumerate(problem.ranks):
        error = problem.errors.dense(i).double()
        rows, columns = error.shape
        span, core = torch.linalg.qr(error) if rows > columns else (None, error)  # S acts within the span of E
        del error
        s = core @ (h @ core.T)
        s += (core @ core.T).mul_(problem.shift)
        values, vectors = torch.linalg.eigh((s + s.T).div_(2))
        vectors = _leading(values, vectors, rank)
        left = vectors if span is None else span @ vectors
        right = core.T @ vectors
        weighed = h @ right + problem.shift * right
        trace = [objective(problem.initial[i], left, right, right, weighed)]
        solutions.append(Solution(left, right, right, weighed, trace))
    return solutions


@dataclass(frozen=True)
class Method:
    run: Callable[[Problem], list[Solution]]
    iterations: int | None  # unless told; None: it makes none
    precision: str  # of products with E, on a GPU: the coarsest that costs no layer 0.01 % of its objective
    products: Callable[[int], int]  # with E, in so many iterations


# Krylov makes its subspace orthonormal at each step, and then tf32 does it no harm. als divides by systems whose
# condition may be 1e8, which takes what tf32 rounds to many times the objective. By benchmarks/precision.py.
METHODS = {
    "krylov": Method(krylov, 3, "tf32", lambda depth: 2 * depth + 3),
    "als": Method(als, 20, _FINE, lambda steps: 2 * steps + 2 * _SVD_DEPTH + 2),
    "eigh": Method(eigh, None, "ieee", lambda _: 1),
    "svd": Method(svd, _SVD_DEPTH, "tf32", lambda depth: 2 * depth + 3),
}


# ---- small matrices


def objective(initial: float, a: Tensor, projected: Tensor, b: Tensor, weighed: Tensor) -> Tensor:
    """1/2 tr(R H Rᵀ), R = E - A Bᵀ, given its value for R = E and the products Eᵀ A and H B: r × r algebra."""
    linear = (projected.double() * weighed.double()).sum()
    quadratic = (_inner(a, a) * _inner(b, weighed)).sum()
    return initial - linear + quadratic / 2


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Leftᵀ Right in fp64."""
    return left.double().T @ right.double()


def _leading(values: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues; zero columns for those whose eigenvalue is only rounding."""
    values, vectors = values[-rank:], vectors[:, -rank:]
    return torch.where(values > _NO_EIGENVALUE * values[-1].clamp_min(0), vectors, 0.0)
