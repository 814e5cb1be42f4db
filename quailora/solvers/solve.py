"""The factors of linear layers, from W, Q and H: what goes into `methods.py` is checked here, and its outcome measured.

Tensors only, no model.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quailora import ops
from quailora.errors import SolverError
from quailora.ops.precision import PRECISIONS, exact_products
from quailora.ops.reference import Dequantizable
from quailora.solvers.als import JITTER
from quailora.solvers.config import SolverConfig
from quailora.solvers.error_matrix import ErrorMatrices, choose_form
from quailora.solvers.problem import Problem, Solution, objective
from quailora.solvers.registry import SOLVERS

# The objective is a difference of sums that fp32 products give to some 1e-7. Where less than this part of the start is
# left, that is an error of over 1e-5, and the objective is computed from the residual itself, in fp64.
_CANCELLATION = 0.01
_FP64_ROWS = 256  # of that residual at once: little beside the panel of H in fp64 that they are multiplied with

# How far from its transpose H may be, and how negative, relative to bounds from its diagonal. Rounding is far below;
# a triangle that was never filled, or a matrix that is no sum of x xᵀ, far above.
_ASYMMETRY, _NEGATIVE = 1e-3, 1e-5


class Gram(Protocol):
    """Anything that can give H, such as `quailora.Gram`."""

    def matrix(self) -> Tensor:
        """H, (n, n) fp32, symmetric."""


class SolverWarning(UserWarning):
    """A layer needed help to be solved; the message says how much."""


@dataclass(frozen=True, eq=False)
class Linear:
    """What to find the factors of."""

    weight: Tensor  # W (m, n), any floating-point dtype
    quantized: Tensor | Dequantizable  # Q (m, n)
    rank: int  # r, 1 to min(m, n)
    name: str = ""  # for errors and warnings


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The solution of one layer: E is approximated by A Bᵀ.

    Balanced: with A Bᵀ = U S Vᵀ, A = U √S and B = V √S. Objectives are 1/2 tr(R H Rᵀ) with the H given, undamped.
    """

    A: Tensor  # (m, r) fp32
    B: Tensor  # (n, r) fp32
    objective: float  # R = E - A Bᵀ
    initial: float  # R = E: QLoRA's start
    trace: tuple[float, ...]  # what the solver minimizes (damped; svd: H = I), at its start and after each iteration
    error_norm: float  # ‖E‖_F
    residual_norm: float  # ‖E - A Bᵀ‖_F
    effective_rank: int  # columns from here on are zero in both factors: there was nothing left to approximate
    jitter: float  # the largest that `als` added, relative to the diagonal of its system; 0.0 if none


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
) -> LoraFactors:
    """The factors whose product best replaces E = `weight` - `quantized` on inputs with correlation `gram`.

    weight:      (m, n), any floating-point dtype.
    quantized:   (m, n), or an object whose `dequantize()` gives that.
    gram:        H (n, n) symmetric, positive semi-definite (singular is fine), or the `Gram` that gathered it.
    rank:        r, 1 to min(m, n).
    solver:      "krylov", "als", "eigh" or "svd".
    iterations:  depth of krylov (default 3) and svd (8), alternations of als (20); eigh has none.
    damping:     the solver works with H + damping · mean(diag H) · I (svd has no H to damp).
    seed:        of the random start of krylov. The same inputs and seed give the same bits.
    precision:   of the kernels' products with E on a GPU: "ieee", "bf16x3", "tf32" or "bf16"; None is the solver's own.
    overwrite_weight: `weight` is not needed any more, and may hold E afterwards: a GPU may then have less to read.

    Raises SolverError for inputs that no factors can be computed from, CalibrationError for a `Gram` without tokens.
    """
    [factors] = solve_group(
        [Linear(weight, quantized, rank)],
        gram,
        SolverConfig(solver, iterations, damping, seed),
        precision=precision,
        overwrite_weights=overwrite_weight,
    )
    return factors


def solve_group(
    linears: Sequence[Linear],
    gram: Tensor | Gram,
    config: SolverConfig,
    *,
    precision: str | None = None,
    overwrite_weights: bool = False,
) -> list[LoraFactors]:
    """`solve` for linears that share their input: the same factors up to rounding, and H is read once for all."""
    if precision is not None and precision not in PRECISIONS:
        raise SolverError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    solver = SOLVERS[config.name]
    weights, quantized = [linear.weight for linear in linears], [linear.quantized for linear in linears]
    device = weights[0].device
    with torch.no_grad(), exact_products(device):
        h = gram.detach().float() if isinstance(gram, Tensor) else gram.matrix()
        for linear in linears:
            _check_shapes(linear, h)
        forms = [
            choose_form(w, q, solver.products(config.steps), overwrite_weights)
            for w, q in zip(weights, quantized, strict=True)
        ]
        errors = ErrorMatrices(weights, quantized, forms, precision or solver.precision)
        stock = _take_stock(linears, errors, h)

        shift = config.damping * stock.mean_diagonal
        # Nothing to do, or no input to do it for.
        idle = [
            norm == 0 or (start + shift * norm**2 / 2 <= 0 and config.name != "svd")
            for norm, start in zip(stock.error_norm, stock.initial, strict=True)
        ]
        active = [i for i, done in enumerate(idle) if not done]
        found: dict[int, LoraFactors] = {}
        if active:
            norms, initial = [stock.error_norm[i] for i in active], [stock.initial[i] for i in active]
            problem = Problem(
                errors=errors.only(active),
                gram=h,
                shift=shift,
                initial=[start + shift * norm**2 / 2 for start, norm in zip(initial, norms, strict=True)],
                error_norm=norms,
                ranks=[linears[i].rank for i in active],
                iterations=config.steps,
                seed=config.seed,
            )
            solutions = solver.run(problem)
            jitter = _check_jitter([linears[i] for i in active], solutions)
            found = dict(zip(active, _finish(problem, solutions, initial, jitter), strict=True))
        return [found.get(i) or _zeros(linear, stock.error_norm[i]) for i, linear in enumerate(linears)]


# ---- before and after


def _check_shapes(linear: Linear, h: Tensor) -> None:
    weight, quantized, rank = linear.weight, linear.quantized, linear.rank
    if weight.dim() != 2 or not weight.is_floating_point():
        raise _error(f"expected a floating-point weight (m, n), got {tuple(weight.shape)} of {weight.dtype}", linear)
    rows, columns = weight.shape
    shape = getattr(quantized, "shape", None)  # of dense and of packed ones
    if shape is not None and tuple(shape) != weight.shape:
        raise _error(f"expected quantized of weight's shape {tuple(weight.shape)}, got {tuple(shape)}", linear)
    if h.shape != (columns, columns):
        raise _error(f"expected gram {(columns, columns)} for weight {(rows, columns)}, got {tuple(h.shape)}", linear)
    if h.device != weight.device:
        raise _error(f"weight is on {weight.device} and gram on {h.device}; move them together", linear)
    if not 1 <= rank <= min(rows, columns):
        raise _error(f"rank must be 1 to {min(rows, columns)} for weight {tuple(weight.shape)}, got {rank}", linear)


@dataclass(frozen=True)
class _Stock:
    """What the host has to know before it starts."""

    error_norm: list[float]  # ‖E‖_F
    initial: list[float]  # 1/2 tr(E H Eᵀ)
    mean_diagonal: float  # of H


def _take_stock(linears: Sequence[Linear], errors: ErrorMatrices, h: Tensor) -> _Stock:
    """Raises SolverError for what cannot be solved.

    The initial objective takes m n² FLOPs: on a GPU many times those of the iteration, but little beside the forward
    pass that H came from (docs/performance.md).
    """
    sums = [h.sum(dim=1), h.sum(dim=0)]
    diagonal = h.diagonal()
    lengths = diagonal.clamp_min(0).sqrt()
    # |h_ij| <= √(h_ii h_jj). Comparing H with its transpose costs far more than comparing their sums.
    asymmetric = ((sums[0] - sums[1]).abs() > _ASYMMETRY * lengths * lengths.sum()).any()
    of_gram = [
        torch.stack(sums).isfinite().all(),
        diagonal.min(),
        asymmetric,
        diagonal.mean(),
        diagonal.sum(),
        diagonal.max(),
    ]
    squares, energies = [], []
    for i in range(len(linears)):
        square, energy = (torch.zeros((), dtype=torch.float64, device=errors.device) for _ in range(2))
        for _, panel in errors.panels(i):
            square += torch.linalg.vector_norm(panel, dtype=torch.float64) ** 2
            energy += ops.gram_energy(h, panel)
        squares.append(square)
        energies.append(energy)
    values = _read([*of_gram, *squares, *energies])

    finite, least, skewed, mean, trace, most = values[: len(of_gram)]
    if not finite:
        raise _error(
            "gram holds values that are not finite: inputs overflow in their dtype, or are too large to add up in fp32",
            *linears,
        )
    if least < 0:
        raise _error(f"gram is no sum of x xᵀ: its diagonal goes down to {least:.3g}", *linears)
    if skewed:
        raise _error("gram is not symmetric; if only one triangle is filled, copy it to the other", *linears)
    norms = [math.sqrt(square) for square in values[len(of_gram) : -len(linears)]]
    initial = [energy / 2 for energy in values[-len(linears) :]]
    for linear, norm, start in zip(linears, norms, initial, strict=True):
        if not math.isfinite(norm):
            q = linear.quantized  # and not W, in whose memory E may be by now
            culprit = "weight" if (q if isinstance(q, Tensor) else q.dequantize()).isfinite().all() else "quantized"
            raise _error(f"{culprit} holds values that are not finite", linear)
        if not math.isfinite(start):
            raise _error(f"the objective overflows with gram up to {most:.3g}; scale it down", linear)
        if start < -_NEGATIVE * norm**2 * trace:
            raise _error(f"gram is not positive semi-definite: the objective to minimize starts at {start:.3g}", linear)
    return _Stock(norms, initial, mean)


def _error(message: str, *linears: Linear) -> SolverError:
    names = ", ".join(linear.name for linear in linears if linear.name)
    return SolverError(f"{names}: {message}" if names else message)


def _check_jitter(linears: Sequence[Linear], solutions: Sequence[Solution]) -> list[float]:
    """What each system of als took, with a warning where it took any; raises SolverError where none would do."""
    added = [solution.jitter for solution in solutions if solution.jitter is not None]
    if not added:
        return [0.0] * len(linears)
    jitters = _read(added)
    for linear, jitter in zip(linears, jitters, strict=True):
        if math.isnan(jitter):
            raise _error(
                f"als: a system of rank {linear.rank} is not positive definite, even with {JITTER[-1]:.0e} of its "
                "diagonal added. Use solver='krylov', or a smaller rank",
                linear,
            )
        if jitter:
            where = f"{linear.name}: " if linear.name else ""
            warnings.warn(
                f"{where}als met systems that were not positive definite and added {jitter:.0e} of their diagonal; "
                f"to fp32, H or E has a rank below {linear.rank}. solver='krylov' needs no such help.",
                SolverWarning,
                stacklevel=4,
            )
    return jitters


def _finish(
    problem: Problem, solutions: Sequence[Solution], initial: Sequence[float], jitter: Sequence[float]
) -> list[LoraFactors]:
    """Balance the factors and take stock, with the H that was given."""
    assert problem.gram is not None
    balanced: list[tuple[Tensor, Tensor]] = []
    scalars: list[list[Tensor]] = []
    for i, solution in enumerate(solutions):
        a, b = solution.left, solution.right
        left, right, columns = _balance(a, b)
        balanced.append((left, right))
        of_outputs = objective(initial[i], a, solution.projected, b, solution.weighed - problem.shift * b)
        of_weights = objective(problem.error_norm[i] ** 2 / 2, a, solution.projected, b, b)  # with H = I
        scalars.append([of_outputs, of_weights, columns, *solution.trace])
    values = iter(_read([scalar for of_one in scalars for scalar in of_one]))
    found = []
    for i, (left, right) in enumerate(balanced):
        left_over, half_square, width, *trace = [next(values) for _ in scalars[i]]
        residual_square = 2 * half_square
        start = problem.initial[i]  # damped, as the sums are
        if left_over < _CANCELLATION * start or residual_square < _CANCELLATION * problem.error_norm[i] ** 2:
            left_over, residual_square = _measure(problem.errors, i, problem.gram, left, right)
        found.append(
            LoraFactors(
                A=left,
                B=right,
                # Summed in fp32, a singular H is positive semi-definite only up to rounding: this may come out below 0.
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


def _measure(errors: ErrorMatrices, index: int, h: Tensor, left: Tensor, right: Tensor) -> tuple[float, float]:
    """The objective and ‖R‖²_F of the residual R = E - A Bᵀ itself, in fp64."""
    energy, square = (torch.zeros((), dtype=torch.float64, device=h.device) for _ in range(2))
    right = right.double()
    for rows, panel in errors.panels(index, whole=False):
        for part, of_part in zip(panel.split(_FP64_ROWS), left[rows].split(_FP64_ROWS), strict=True):
            residual = part.double().addmm_(of_part.double(), right.T, alpha=-1)
            energy += ops.gram_energy(h, residual) / 2
            square += residual.norm().square()
    left_over, residual_square = _read([energy, square])
    return left_over, residual_square


def _balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U √S, V √S, number of nonzero S), fp32, for a bᵀ = U S Vᵀ."""
    left, left_core = torch.linalg.qr(a.double())
    right, right_core = torch.linalg.qr(b.double())
    u, s, vt = torch.linalg.svd(left_core @ right_core.T)
    s = torch.where(s > len(s) * torch.finfo(s.dtype).eps * s[0], s, 0.0)
    root = s.sqrt()
    return (left @ (u * root)).float(), (right @ (vt.T * root)).float(), (s > 0).sum()


def _zeros(linear: Linear, error_norm: float) -> LoraFactors:
    rows, columns = linear.weight.shape
    return LoraFactors(
        A=torch.zeros(rows, linear.rank, device=linear.weight.device),
        B=torch.zeros(columns, linear.rank, device=linear.weight.device),
        objective=0.0,
        initial=0.0,
        trace=(0.0,),
        error_norm=error_norm,
        residual_norm=error_norm,
        effective_rank=0,
        jitter=0.0,
    )


def _read(scalars: Sequence[Tensor]) -> list[float]:
    """Their values: where the host waits for the device, and the only place."""
    return torch.stack([scalar.double() for scalar in scalars]).tolist()
