"""`quailora.solve`: from W, Q and H to balanced factors A and B, and what they leave of the error."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quailora import ops
from quailora.errors import NotFiniteError, SolverError
from quailora.ops.precision import PRECISIONS, exact_products
from quailora.ops.reference import Dequantizable
from quailora.solvers.als import JITTER
from quailora.solvers.config import SolverConfig
from quailora.solvers.error_matrix import ErrorMatrices, choose_form
from quailora.solvers.inputs import Linear, check_shapes, check_types, error_of, measure
from quailora.solvers.problem import Problem, Solution, inner, objective, to_floats, to_host
from quailora.solvers.registry import SOLVERS, Solver

# The objective is a difference of sums that fp32 products give to about 1e-7. Where less than this fraction of the
# initial objective is left, that is an error of more than 1e-5, so the objective is computed from the residual in fp64.
_CANCELLATION = 0.01
_FP64_ROWS = 256  # of that residual at a time: little next to the panel of H in fp64 that multiplies them


class Gram(Protocol):
    """Anything that can give H, such as `quailora.Gram`."""

    def matrix(self) -> Tensor:
        """H, (n, n) fp32, symmetric."""


class SolverWarning(UserWarning):
    """A system was singular and had to be regularized; the message says how much."""


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The solution of one layer: E is approximated by A Bᵀ.

    The factors are balanced: with A Bᵀ = U S Vᵀ, A = U √S and B = V √S. Objectives are 1/2 tr(R H Rᵀ) with the H that
    was given, undamped.
    """

    A: Tensor  # (m, r) fp32
    B: Tensor  # (n, r) fp32
    objective: float  # at R = E - A Bᵀ
    initial: float  # at R = E, QLoRA's initialization
    trace: tuple[float, ...]  # what the solver minimizes (damped; svd: H = I); all but the last only if asked for
    error_norm: float  # ‖E‖_F
    residual_norm: float  # ‖E - A Bᵀ‖_F
    effective_rank: int  # columns from this one on are zero in both factors: nothing was left to approximate
    jitter: float  # the largest that `als` added to a system, relative to its diagonal; usually 0


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
    precision: str | None = None,
    overwrite_weight: bool = False,
    trace: bool = False,
) -> LoraFactors:
    """Find the factors whose product best approximates E = `weight` - `quantized` on inputs with correlation `gram`.

    weight:      (m, n), any floating-point dtype.
    quantized:   (m, n), or an object whose `dequantize()` returns that.
    gram:        H (n, n), symmetric and positive semi-definite (it may be singular), or a `Gram`.
    rank:        r, 1 to min(m, n).
    solver:      "krylov", "als", "eigh" or "svd".
    iterations:  the exact number of steps of krylov and svd, and of alternations of als; eigh has none. None is as many
                 steps as gain, about 3 and 8, and 20 alternations.
    damping:     the solver works with H + damping · mean(diag H) · I (svd does not use H).
    seed:        of the random vectors that krylov starts from. The same inputs and seed give the same bits.
    precision:   of the kernels' products with E on a GPU: "ieee", "bf16x3", "tf32" or "bf16"; None is the solver's own.
    overwrite_weight: `weight` is not needed afterwards and may be overwritten with E, which can save a GPU some reads.
    trace:       also report what the solver minimizes at its start and after each iteration, which takes longer.

    Raises SolverError for inputs that no factors can be computed from, CalibrationError for a `Gram` without tokens.
    """
    [factors] = solve_group(
        [Linear(weight, quantized, rank)],
        gram,
        SolverConfig(solver, iterations, damping, seed),
        precision=precision,
        overwrite_weights=overwrite_weight,
        traced=trace,
    )
    return factors


def solve_group(
    linears: Sequence[Linear],
    gram: Tensor | Gram,
    config: SolverConfig,
    *,
    precision: str | None = None,
    overwrite_weights: bool = False,
    traced: bool = False,
) -> list[LoraFactors]:
    """`solve` for layers that share their input: the same factors up to rounding, but H is read once for all."""
    if precision is not None and precision not in PRECISIONS:
        raise SolverError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    solver = SOLVERS[config.name]
    for linear in linears:
        check_types(linear, gram)
    weights, quantized = [linear.weight for linear in linears], [linear.quantized for linear in linears]
    device = weights[0].device
    with torch.no_grad(), exact_products(device):
        h = gram.detach().float() if isinstance(gram, Tensor) else gram.matrix()
        for linear in linears:
            check_shapes(linear, h)
        forms = [
            choose_form(w, q, solver.products(config.steps), overwrite_weights)
            for w, q in zip(weights, quantized, strict=True)
        ]
        errors = ErrorMatrices(weights, quantized, forms, precision or solver.precision)
        statistics = measure(linears, errors, h)

        shift = config.damping * statistics.mean_diagonal
        # The factors are zero where there is no error, or no input to weight it by.
        trivial = [
            norm == 0 or (start + shift * norm**2 / 2 <= 0 and solver.uses_gram)
            for norm, start in zip(statistics.error_norm, statistics.initial, strict=True)
        ]
        active = [i for i, is_trivial in enumerate(trivial) if not is_trivial]
        found: dict[int, LoraFactors] = {}
        if active:
            norms, initial = [statistics.error_norm[i] for i in active], [statistics.initial[i] for i in active]
            problem = Problem(
                errors=errors.subset(active),
                gram=h,
                shift=shift,
                initial=[start + shift * norm**2 / 2 for start, norm in zip(initial, norms, strict=True)],
                error_norm=norms,
                ranks=[linears[i].rank for i in active],
                iterations=config.steps,
                seed=config.seed,
                enough=solver.enough if config.iterations is None else 0.0,
                traced=traced,
            )
            solutions = solver.run(problem)
            solved = [linears[i] for i in active]
            jitter = _check_jitter(solved, solutions)
            found = dict(zip(active, _finish(solved, problem, solver, solutions, initial, jitter), strict=True))
        return [found.get(i) or _zeros(linear, statistics.error_norm[i]) for i, linear in enumerate(linears)]


def _check_jitter(linears: Sequence[Linear], solutions: Sequence[Solution]) -> list[float]:
    """The jitter that als added for each layer, with a warning if any. Raises SolverError where none was enough."""
    added = [solution.jitter for solution in solutions if solution.jitter is not None]
    if not added:
        return [0.0] * len(linears)
    jitters = to_floats(added)
    for linear, jitter in zip(linears, jitters, strict=True):
        if math.isnan(jitter):
            raise error_of(
                f"als: a system of rank {linear.rank} is not positive definite, even with {JITTER[-1]:.0e} of its "
                "diagonal added. Use solver='krylov' (--solver krylov), or a smaller rank (--rank)",
                linear,
            )
        if jitter:
            where = f"{linear.name}: " if linear.name else ""
            warnings.warn(
                f"{where}als met systems that were not positive definite and added {jitter:.0e} of their diagonal; "
                f"in fp32, H or E has a rank below {linear.rank}. solver='krylov' does not need this.",
                SolverWarning,
                stacklevel=4,
            )
    return jitters


def _finish(
    linears: Sequence[Linear],
    problem: Problem,
    solver: Solver,
    solutions: Sequence[Solution],
    initial: Sequence[float],
    jitter: Sequence[float],
) -> list[LoraFactors]:
    """Balance the factors and measure what they leave, with the undamped H. Raises NotFiniteError if that is not."""
    assert problem.gram is not None
    products = to_host([product for solution in solutions for product in solution.products()])
    traces = iter(to_floats([value for solution in solutions for value in solution.trace]))
    found = []
    for i, solution in enumerate(solutions):
        gram_left, damped_linear, damped_square, linear, square = products[5 * i : 5 * i + 5]
        of_outputs = objective(
            initial[i], gram_left, damped_linear - problem.shift * linear, damped_square - problem.shift * square
        )
        of_weights = objective(problem.error_norm[i] ** 2 / 2, gram_left, linear, square)  # with H = I
        left, right, columns = _balance(solution, square)
        left_over, half_square, width = to_floats([of_outputs, of_weights, columns])
        trace = [next(traces) for _ in solution.trace]
        if problem.errors.coarse:  # what the iteration knew is not accurate
            trace[-1] = left_over + problem.shift * half_square if solver.uses_gram else half_square
        residual_square = 2 * half_square
        start = problem.initial[i]  # damped, as the sums are
        if left_over < _CANCELLATION * start or residual_square < _CANCELLATION * problem.error_norm[i] ** 2:
            left_over, residual_square = _measure_residual(problem.errors, i, problem.gram, left, right)
        if not math.isfinite(left_over):
            raise error_of("what the factors leave of the error is not finite", linears[i], kind=NotFiniteError)
        found.append(
            LoraFactors(
                A=left,
                B=right,
                # A singular H that was summed in fp32 is positive semi-definite only up to rounding, so this may come
                # out slightly negative.
                objective=max(0.0, left_over),
                initial=max(0.0, initial[i]),
                trace=tuple(trace),
                error_norm=problem.error_norm[i],
                residual_norm=math.sqrt(residual_square),
                effective_rank=int(width),
                jitter=jitter[i],
            )
        )
    return found


def _measure_residual(errors: ErrorMatrices, index: int, h: Tensor, left: Tensor, right: Tensor) -> tuple[float, float]:
    """The objective and ‖R‖²_F of the residual R = E - A Bᵀ, in fp64."""
    energy, square = (torch.zeros((), dtype=torch.float64, device=h.device) for _ in range(2))
    right = right.double()
    for rows, panel in errors.panels(index, whole=False):
        for part, of_part in zip(panel.split(_FP64_ROWS), left[rows].split(_FP64_ROWS), strict=True):
            residual = part.double().addmm_(of_part.double(), right.T, alpha=-1)
            energy += ops.gram_energy(h, residual) / 2
            square += residual.norm().square()
    left_over, residual_square = to_floats([energy, square])
    return left_over, residual_square


def _balance(solution: Solution, square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U √S, V √S, number of nonzero S), fp32, for a bᵀ = U S Vᵀ, from `square` = bᵀ b on the host.

    With orthonormal columns in a, and bᵀ b = C S² Cᵀ, U = a C and V S = b C. S is as exact as the entries of b where
    b is of fp32: what squaring loses is below 1e-7 of the largest.
    """
    a, b = solution.left, solution.right
    if not solution.orthonormal:
        a, core = torch.linalg.qr(a.double())
        b = b.double() @ core.T
        [square] = to_host([inner(b, b)])
    squares, turn = torch.linalg.eigh(square)
    squares, turn = squares.flip(0), turn.flip(1)
    squares = torch.where(squares > len(squares) * torch.finfo(squares.dtype).eps * squares[0], squares, 0.0)
    root = squares.sqrt().sqrt()
    of_right = torch.where(root > 0, 1 / root, 0.0)
    left, right = a @ (turn * root).to(a), b @ (turn * of_right).to(b)
    return left.float(), right.float(), (squares > 0).sum()


def _zeros(linear: Linear, error_norm: float) -> LoraFactors:
    rows, columns = linear.weight.shape
    return LoraFactors(
        A=torch.zeros(rows, linear.rank, dtype=torch.float32, device=linear.weight.device),
        B=torch.zeros(columns, linear.rank, dtype=torch.float32, device=linear.weight.device),
        objective=0.0,
        initial=0.0,
        trace=(0.0,),
        error_norm=error_norm,
        residual_norm=error_norm,
        effective_rank=0,
        jitter=0.0,
    )
