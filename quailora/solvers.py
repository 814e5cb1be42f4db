"""The factors of one linear layer: min over A, B of 1/2 tr(R H Rᵀ), R = E - A Bᵀ, E = W - Q (arXiv 2410.14713).

Tensors only. The optimum is A = the top r eigenvectors of S = E H Eᵀ and B = Eᵀ A (CLoQ, arXiv 2501.18475).

    krylov  block Krylov: nearest to the optimum for the fewest passes over E
    als     the paper's alternation, which is subspace iteration on S
    eigh    the closed form, in fp64
    svd     ignores H: the best approximation of E itself, and the start of als

Products with E and H are fp32; whatever is r wide and small is fp64; both on the device of the inputs.
"""

import difflib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quailora import ops
from quailora.errors import SolverError
from quailora.gram import Gram
from quailora.precision import exact_products
from quailora.reference import Dequantizable

# Eigenvalues of S below this part of the largest are the square of fp32 rounding. (Rounding itself would be too much:
# one outlier channel 1000 times the others makes its own eigenvalue 1e6 times theirs.)
_NO_EIGENVALUE = (16 * torch.finfo(torch.float32).eps) ** 2

# Jitter for systems that are not positive definite, relative to their mean diagonal: first try, and the last.
_LEAST_JITTER, _MOST_JITTER = 1e-10, 1e-2

# The objective is a difference of sums that fp32 products give to some 1e-7. Where less than this part of the start is
# left, that is an error of over 1e-5, and the objective is computed from the residual itself, in fp64.
_CANCELLATION = 0.01

# How far from its transpose H may be, and how negative, relative to bounds from its diagonal. Rounding is far below;
# a triangle that was never filled, or a matrix that is no sum of x xᵀ, far above.
_ASYMMETRY, _NEGATIVE = 1e-3, 1e-5


class SolverWarning(UserWarning):
    """A layer needed help to be solved; the message says how much."""


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The solution of one layer: E is approximated by A Bᵀ.

    Balanced: with A Bᵀ = U S Vᵀ, A = U √S and B = V √S. Objectives are 1/2 tr(R H Rᵀ) with the H given, undamped.
    """

    A: Tensor  # (m, r) fp32
    B: Tensor  # (n, r) fp32
    objective: float  # R = E - A Bᵀ
    initial: float  # R = E: QLoRA's start
    trace: tuple[float, ...]  # what the solver minimises (damped; svd: H = I), at its start and after each iteration
    error_norm: float  # ‖E‖_F
    residual_norm: float  # ‖E - A Bᵀ‖_F
    effective_rank: int  # columns from here on are zero in both factors: there was nothing left to approximate
    jitter: float  # the largest that `als` added, relative to the mean diagonal of its system; 0.0 if none


@dataclass
class _Problem:
    """What a solver is given. H is damped: H + shift · I, with `shift` apart so that H need not be copied."""

    error: ops.ErrorMatrix
    gram: Tensor
    shift: float
    initial: float  # the damped objective of A Bᵀ = 0
    error_norm: float
    rank: int
    iterations: int
    seed: int

    def weigh(self, right: Tensor) -> Tensor:
        """H P, damped."""
        product = ops.gram_product(self.gram, right)
        return product.add_(right, alpha=self.shift) if self.shift else product


@dataclass
class _Solution:
    """What a solver returns: the factors as they come, and the two products every objective is made of."""

    left: Tensor  # A (m, k), k <= r
    right: Tensor  # B (n, k)
    projected: Tensor  # Eᵀ A
    weighed: Tensor  # H B, damped
    trace: list[float]
    jitter: float = 0.0


def solve(
    weight: Tensor,
    quantized: Tensor | Dequantizable,
    gram: Tensor | Gram,
    rank: int,
    *,
    solver: str = "krylov",
    iterations: int | None = None,
    damping: float = 0.0,
    seed: int = 0,
) -> LoraFactors:
    """The factors whose product best replaces E = `weight` - `quantized` on inputs with correlation `gram`.

    weight:      (m, n), any floating-point dtype.
    quantized:   (m, n), or an object whose `dequantize()` gives that.
    gram:        H (n, n) symmetric, positive semi-definite (singular is fine), or the `Gram` that gathered it.
    rank:        r, 1 to min(m, n).
    solver:      "krylov", "als", "eigh" or "svd".
    iterations:  depth of krylov (default 3), alternations of als (default 20); the others have none.
    damping:     the solver works with H + damping · mean(diag H) · I (svd has no H to damp).
    seed:        of the random start of krylov. The same inputs and seed give the same bits.

    Raises SolverError for inputs that no factors can be computed from, CalibrationError for a `Gram` without tokens.
    """
    check_solver(solver, iterations, damping)
    run, default_iterations = _SOLVERS[solver]
    with torch.no_grad(), exact_products(weight.device):
        h = gram.matrix() if isinstance(gram, Gram) else gram.detach().float()
        _check_shapes(weight, quantized, h, rank)
        _check_gram(h)
        error = ops.ErrorMatrix(weight, quantized)
        error_norm = _norm(error.dense())
        if not math.isfinite(error_norm):
            raise SolverError(f"{'quantized' if _finite(weight) else 'weight'} holds values that are not finite")
        shift = damping * h.diagonal().mean().item()
        initial = ops.gram_energy(h, error.dense()).item() / 2
        if not math.isfinite(initial):
            raise SolverError(f"the objective overflows with gram up to {h.diagonal().max().item():.3g}; scale it down")
        if initial < -_NEGATIVE * error_norm**2 * h.trace().item():
            raise SolverError(f"gram is not positive semi-definite: the objective to minimise starts at {initial:.3g}")
        problem = _Problem(
            error=error,
            gram=h,
            shift=shift,
            initial=initial + shift * error_norm**2 / 2,
            error_norm=error_norm,
            rank=rank,
            iterations=iterations if iterations is not None else default_iterations or 0,
            seed=seed,
        )
        if error_norm == 0 or (problem.initial <= 0 and run is not _svd):  # nothing to do, or no input to do it for
            return _zeros(problem)
        return _finish(problem, run(problem), initial)


def _krylov(problem: _Problem) -> _Solution:
    """Rayleigh-Ritz on the span of Y₀, S Y₀, S² Y₀, ..., where Y₀ = E H Ω with a Gaussian Ω.

    After Musco and Musco, arXiv 1504.05477. Products with E: 2 · depth + 2.
    """
    (rows, columns), rank, device = problem.error.shape, problem.rank, problem.error.device
    generator = torch.Generator().manual_seed(problem.seed)  # on the CPU, so that every device starts alike
    start = torch.randn(columns, rank, generator=generator).to(device)
    block = ops.orthonormalize(problem.error.times(problem.weigh(start)))
    if block.shape[1] < rank:  # an outlier channel may drown the rest of the start in rounding: fill up with chance
        filling = torch.randn(rows, rank - block.shape[1], generator=generator).to(device)
        block = torch.cat([ops.orthonormalize(filling, block), block], dim=1)

    basis, projected, weighed = block[:, :0], block.new_empty(columns, 0), block.new_empty(columns, 0)
    widths = []  # of the nested subspaces
    for step in range(problem.iterations + 1):
        basis = torch.cat([basis, block], dim=1)
        projected = torch.cat([projected, problem.error.transposed_times(block)], dim=1)
        weighed = torch.cat([weighed, problem.weigh(projected[:, -block.shape[1] :])], dim=1)
        widths.append(basis.shape[1])
        if step == problem.iterations:
            break
        block = ops.orthonormalize(problem.error.times(weighed[:, -block.shape[1] :]), basis)
        if block.shape[1] == 0:  # S maps the span into itself: its top eigenvectors are in there
            break

    restricted = projected.double().T @ weighed.double()  # S on the span
    restricted = (restricted + restricted.T) / 2
    trace = []
    for width in widths[:-1]:
        values = torch.linalg.eigvalsh(restricted[:width, :width])[-rank:]
        trace.append(problem.initial - values.clamp_min(0).sum().item() / 2)
    values, vectors = torch.linalg.eigh(restricted)
    trace.append(problem.initial - values[-rank:].clamp_min(0).sum().item() / 2)
    ritz = _leading(values, vectors, rank).float()
    left, right, weighed = basis @ ritz, projected @ ritz, weighed @ ritz
    return _Solution(left, right, right, weighed, trace)


def _als(problem: _Problem) -> _Solution:
    """The paper's: from the SVD of E, A := E H B (Bᵀ H B)⁻¹ and B := Eᵀ A (Aᵀ A)⁻¹ in turn, two products with E."""
    u, b = _truncated_svd(problem)
    balance = torch.linalg.vector_norm(b, dim=0).sqrt()  # b = V Σ so far
    a, projected, b = u * balance, b * balance, b / balance
    weighed = problem.weigh(b)
    trace = [_objective(problem.initial, a, projected, b, weighed)]
    jitter = 0.0
    for _ in range(problem.iterations):
        a, needed = _divide(problem.error.times(weighed), _inner(b, weighed))
        jitter = max(jitter, needed)
        projected = problem.error.transposed_times(a)
        b, needed = _divide(projected, _inner(a, a))
        jitter = max(jitter, needed)
        weighed = problem.weigh(b)
        trace.append(_objective(problem.initial, a, projected, b, weighed))
    if jitter:
        warnings.warn(
            f"als met systems that were not positive definite and added {jitter:.0e} of their mean diagonal; "
            f"to fp32, H or E has a rank below {problem.rank}. solver='krylov' needs no such help.",
            SolverWarning,
            stacklevel=3,
        )
    return _Solution(a, b, projected, weighed, trace, jitter)


def _eigh(problem: _Problem) -> _Solution:
    """The closed form: A = the top r eigenvectors of S = E H Eᵀ, B = Eᵀ A."""
    error, h = problem.error.dense().double(), problem.gram.double()
    rows, columns = error.shape
    span, core = torch.linalg.qr(error) if rows > columns else (None, error)  # S acts within the span of E
    s = core @ (h @ core.T) + problem.shift * (core @ core.T)
    values, vectors = torch.linalg.eigh((s + s.T) / 2)
    vectors = _leading(values, vectors, problem.rank)
    left = vectors if span is None else span @ vectors
    right = core.T @ vectors
    weighed = h @ right + problem.shift * right
    return _Solution(left, right, right, weighed, [_objective(problem.initial, left, right, right, weighed)])


def _svd(problem: _Problem) -> _Solution:
    """The uncalibrated objective 1/2 ‖E - A Bᵀ‖²_F, which is (1) with H = I."""
    left, right = _truncated_svd(problem)
    trace = [(problem.error_norm**2 - _norm(right) ** 2) / 2]
    return _Solution(left, right, right, problem.weigh(right), trace)


# Solver -> its function and how many iterations it makes unless told.
_SOLVERS: dict[str, tuple[Callable[[_Problem], _Solution], int | None]] = {
    "krylov": (_krylov, 3),
    "als": (_als, 20),
    "eigh": (_eigh, None),
    "svd": (_svd, None),
}


def check_solver(solver: str, iterations: int | None, damping: float) -> None:
    """What `solve` checks of its settings, for those who want to know before there is anything to solve.

    Raises SolverError: a solver there is not (with the nearest name), or a setting that it does not take.
    """
    if solver not in _SOLVERS:
        near = difflib.get_close_matches(solver, _SOLVERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SolverError(f"unknown solver {solver!r}; {hint}there are {', '.join(_SOLVERS)}")
    _, default_iterations = _SOLVERS[solver]
    if iterations is not None and (default_iterations is None or iterations < 0):
        allowed = "takes no iterations" if default_iterations is None else "needs iterations >= 0"
        raise SolverError(f"solver {solver!r} {allowed}, got iterations={iterations}")
    if not (math.isfinite(damping) and damping >= 0):
        raise SolverError(f"damping must be finite and >= 0, got {damping}")


def _check_shapes(weight: Tensor, quantized: Tensor | Dequantizable, h: Tensor, rank: int) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise SolverError(f"expected a floating-point weight (m, n), got {tuple(weight.shape)} of {weight.dtype}")
    rows, columns = weight.shape
    if isinstance(quantized, Tensor) and quantized.shape != weight.shape:
        raise SolverError(f"expected quantized of weight's shape {tuple(weight.shape)}, got {tuple(quantized.shape)}")
    if h.shape != (columns, columns):
        raise SolverError(f"expected gram {(columns, columns)} for weight {(rows, columns)}, got {tuple(h.shape)}")
    if h.device != weight.device:
        raise SolverError(f"weight is on {weight.device} and gram on {h.device}; move them together")
    if not 1 <= rank <= min(rows, columns):
        raise SolverError(f"rank must be 1 to {min(rows, columns)} for weight {tuple(weight.shape)}, got {rank}")


def _check_gram(h: Tensor) -> None:
    """Finite, symmetric, no negative diagonal, in two passes over H: comparing it with its transpose costs many."""
    rows, columns = h.sum(dim=1), h.sum(dim=0)
    if not (_finite(rows) and _finite(columns)):
        raise SolverError(
            "gram holds values that are not finite: inputs overflow in their dtype, or are too large to add up in fp32"
        )
    diagonal = h.diagonal()
    if diagonal.min() < 0:
        raise SolverError(f"gram is no sum of x xᵀ: its diagonal goes down to {diagonal.min().item():.3g}")
    lengths = diagonal.sqrt()
    if ((rows - columns).abs() > _ASYMMETRY * lengths * lengths.sum()).any():  # |h_ij| <= √(h_ii h_jj)
        raise SolverError("gram is not symmetric; if only one triangle is filled, copy it to the other")


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Leftᵀ Right in fp64."""
    return left.double().T @ right.double()


def _leading(values: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues, without those whose eigenvalue is only rounding."""
    values, vectors = values[-rank:], vectors[:, -rank:]
    return vectors[:, values > _NO_EIGENVALUE * values[-1].clamp_min(0)]


def _truncated_svd(problem: _Problem) -> tuple[Tensor, Tensor]:
    """(U, V Σ) of the rank-r SVD of E, fp32, from the smaller of E Eᵀ and Eᵀ E.

    In fp64 the square loses singular values below 1e-8 of the largest: less than the rounding of E's fp32 values.
    """
    error = problem.error.dense().double()
    wide = error.shape[0] <= error.shape[1]
    values, vectors = torch.linalg.eigh(error @ error.T if wide else error.T @ error)
    vectors = _leading(values, vectors, problem.rank).float()
    left = vectors if wide else ops.orthonormalize(problem.error.times(vectors))
    return left, problem.error.transposed_times(left)


def _divide(numerator: Tensor, system: Tensor) -> tuple[Tensor, float]:
    """numerator · system⁻¹, (k, r) and symmetric (r, r) fp64, and the jitter it took relative to the mean diagonal."""
    system = (system + system.T) / 2
    mean = system.diagonal().mean().item()
    jitter = 0.0
    while mean > 0 and jitter <= _MOST_JITTER:
        shifted = system + jitter * mean * torch.eye(len(system), dtype=system.dtype, device=system.device)
        solution, info = ops.cholesky_solve(shifted, numerator.double().T)
        if info.item() == 0 and _finite(solution):
            return solution.T.to(numerator.dtype), jitter
        jitter = max(10 * jitter, _LEAST_JITTER)
    raise SolverError(
        f"als: a system of rank {len(system)} with mean diagonal {mean:.3g} is not positive definite, "
        f"even with {_MOST_JITTER:.0e} of that added. Use solver='krylov', or a smaller rank"
    )


def _objective(initial: float, a: Tensor, projected: Tensor, b: Tensor, weighed: Tensor) -> float:
    """1/2 tr(R H Rᵀ), R = E - A Bᵀ, given its value for R = E and the products Eᵀ A and H B: r × r algebra."""
    linear = (projected.double() * weighed.double()).sum()
    quadratic = (_inner(a, a) * _inner(b, weighed)).sum()
    return initial - linear.item() + quadratic.item() / 2


def _finish(problem: _Problem, solution: _Solution, initial: float) -> LoraFactors:
    """Balance the factors and take stock, with the H that was given."""
    a, b = solution.left, solution.right
    weighed = solution.weighed - problem.shift * b
    objective = _objective(initial, a, solution.projected, b, weighed)
    residual_square = 2 * _objective(problem.error_norm**2 / 2, a, solution.projected, b, b)
    left, right, effective_rank = _balance(a, b, problem.rank)
    if objective < _CANCELLATION * initial or residual_square < _CANCELLATION * problem.error_norm**2:
        residual = problem.error.dense().double() - left.double() @ right.double().T
        objective = ops.gram_energy(problem.gram, residual).item() / 2
        residual_square = _norm(residual) ** 2
    return LoraFactors(
        A=left,
        B=right,
        # Summed in fp32, a singular H is positive semi-definite only up to rounding: what is left may come out below 0.
        objective=max(0.0, objective),
        initial=max(0.0, initial),
        trace=tuple(solution.trace),
        error_norm=problem.error_norm,
        residual_norm=math.sqrt(residual_square),
        effective_rank=effective_rank,
        jitter=solution.jitter,
    )


def _balance(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, int]:
    """(U √S, V √S, number of nonzero S), fp32 and `rank` columns wide, for a bᵀ = U S Vᵀ."""
    left, left_core = torch.linalg.qr(a.double())
    right, right_core = torch.linalg.qr(b.double())
    u, s, vt = torch.linalg.svd(left_core @ right_core.T)
    s = s[s > len(s) * torch.finfo(s.dtype).eps * s.amax()] if len(s) else s
    width, root = len(s), s.sqrt()
    factors = left @ (u[:, :width] * root), right @ (vt[:width].T * root)
    padded = [torch.nn.functional.pad(factor, (0, rank - width)).float() for factor in factors]
    return padded[0], padded[1], width


def _zeros(problem: _Problem) -> LoraFactors:
    rows, columns = problem.error.shape
    zeros = torch.zeros(rows + columns, problem.rank, device=problem.error.device)
    return LoraFactors(
        A=zeros[:rows].clone(),
        B=zeros[rows:].clone(),
        objective=0.0,
        initial=0.0,
        trace=(0.0,),
        error_norm=problem.error_norm,
        residual_norm=problem.error_norm,
        effective_rank=0,
        jitter=0.0,
    )
