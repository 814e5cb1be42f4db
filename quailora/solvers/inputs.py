"""The inputs of a solve: checked, and measured once before it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from quailora import ops
from quailora.errors import NotFiniteError, SolverError
from quailora.ops.reference import Dequantizable
from quailora.solvers.error_matrix import ErrorMatrices
from quailora.solvers.problem import to_floats

# How asymmetric H may be, and how negative, relative to bounds from its diagonal. Rounding stays far below both; a
# triangle that was never filled, or a matrix that is not a sum of x xᵀ, is far above.
_ASYMMETRY, _NEGATIVE = 1e-3, 1e-5


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer to find the factors of."""

    weight: Tensor  # W (m, n), any floating-point dtype
    quantized: Tensor | Dequantizable  # Q (m, n)
    rank: int  # r, 1 to min(m, n)
    name: str = ""  # for errors and warnings


@dataclass(frozen=True)
class Statistics:
    """What the host must know before it starts; lists are by layer."""

    error_norm: list[float]  # ‖E‖_F
    initial: list[float]  # 1/2 tr(E H Eᵀ)
    mean_diagonal: float  # of H


def check_types(linear: Linear, gram: object) -> None:
    """Raises SolverError for what is neither a tensor nor an object that gives one, and a rank that is no integer."""
    for name, value, method in (
        ("weight", linear.weight, None),
        ("quantized", linear.quantized, "dequantize"),
        ("gram", gram, "matrix"),
    ):
        if not (isinstance(value, Tensor) or (method and hasattr(value, method))):
            other = f", or an object with {method}()" if method else ""
            raise error_of(f"{name} must be a torch.Tensor{other}; got {type(value).__name__}", linear)
    if not isinstance(linear.rank, Integral):
        raise error_of(f"rank must be a whole number, got {linear.rank!r}", linear)


def check_shapes(linear: Linear, h: Tensor) -> None:
    """Raises SolverError if shapes, dtypes or devices do not match, or the rank is out of range."""
    weight, quantized, rank = linear.weight, linear.quantized, linear.rank
    if weight.dim() != 2 or not weight.is_floating_point():
        raise error_of(f"expected a floating-point weight (m, n), got {tuple(weight.shape)} of {weight.dtype}", linear)
    rows, columns = weight.shape
    shape = getattr(quantized, "shape", None)  # an object that only dequantizes may have none
    if shape is not None and tuple(shape) != weight.shape:
        raise error_of(f"expected quantized of weight's shape {tuple(weight.shape)}, got {tuple(shape)}", linear)
    if h.shape != (columns, columns):
        raise error_of(f"expected gram {(columns, columns)} for weight {(rows, columns)}, got {tuple(h.shape)}", linear)
    if h.device != weight.device:
        raise error_of(f"weight is on {weight.device} and gram on {h.device}; move them together", linear)
    if not 1 <= rank <= min(rows, columns):
        raise error_of(f"rank must be 1 to {min(rows, columns)} for weight {tuple(weight.shape)}, got {rank}", linear)


def measure(linears: Sequence[Linear], errors: ErrorMatrices, h: Tensor) -> Statistics:
    """Norms and initial objectives, read by the host all at once. Raises SolverError for what cannot be solved.

    The initial objective takes m n² FLOPs: on a GPU many times those of the iteration, but little next to the forward
    pass that H came from (docs/performance.md).
    """
    sums = [h.sum(dim=1), h.sum(dim=0)]
    diagonal = h.diagonal()
    lengths = diagonal.clamp_min(0).sqrt()
    # Row and column sums are far cheaper to compare than H and its transpose. |h_ij| <= √(h_ii h_jj) bounds both.
    asymmetric = ((sums[0] - sums[1]).abs() > _ASYMMETRY * lengths * lengths.sum()).any()
    of_gram = [torch.stack(sums).sum(dtype=torch.float64), diagonal.min(), asymmetric, diagonal.sum(), diagonal.max()]
    # Of each panel of each E.
    parts = [
        [(torch.linalg.vector_norm(e, dtype=torch.float64), ops.gram_energy(h, e)) for _, e in errors.panels(i)]
        for i in range(len(linears))
    ]
    values = iter(to_floats([*of_gram, *(value for of_one in parts for pair in of_one for value in pair)]))

    total, smallest, skewed, trace, largest = (next(values) for _ in of_gram)
    if not math.isfinite(total):
        raise error_of(
            "gram holds values that are not finite: inputs overflow in their dtype, or are too large to add up in fp32",
            *linears,
            kind=NotFiniteError,
        )
    if smallest < 0:
        raise error_of(f"gram is not a sum of x xᵀ: its diagonal goes down to {smallest:.3g}", *linears)
    if skewed:
        raise error_of("gram is not symmetric; if only one triangle is filled, copy it to the other", *linears)
    norms, initial = [], []
    for of_one in parts:
        of_panels = [(next(values), next(values)) for _ in of_one]
        norms.append(math.hypot(*(norm for norm, _ in of_panels)))
        initial.append(sum(energy for _, energy in of_panels) / 2)
    for linear, norm, start in zip(linears, norms, initial, strict=True):
        if not math.isfinite(norm):
            q = linear.quantized  # not W: E may have been written over it
            culprit = "weight" if (q if isinstance(q, Tensor) else q.dequantize()).isfinite().all() else "quantized"
            raise error_of(f"{culprit} holds values that are not finite", linear)
        if not math.isfinite(start):
            raise error_of(f"the objective overflows with gram up to {largest:.3g}; scale it down", linear)
        if start < -_NEGATIVE * norm**2 * trace:
            raise error_of(
                f"gram is not positive semi-definite: the objective to minimize starts at {start:.3g}", linear
            )
    return Statistics(norms, initial, trace / len(diagonal))


def error_of(message: str, *linears: Linear, kind: type[SolverError] = SolverError) -> SolverError:
    """The error to raise, which begins with the names of the layers."""
    names = ", ".join(linear.name for linear in linears if linear.name)
    return kind(f"{names}: {message}" if names else message)
