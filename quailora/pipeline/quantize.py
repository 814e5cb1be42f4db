"""From W and H of linears that share an input to Q and the factors: Q read or rounded to nearest, or chosen with the
factors by calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quailora import ops
from quailora.calibration.gram import Gram
from quailora.errors import CheckpointError
from quailora.pipeline.stages import Stages
from quailora.quantization.feedback import Curvature
from quailora.quantization.magr import reduce_magnitude
from quailora.quantization.protocol import QuantizedBase, QuantizedWeight
from quailora.quantization.rounding import RoundingConfig
from quailora.solvers.config import SolverConfig
from quailora.solvers.inputs import Linear
from quailora.solvers.solve import LoraFactors, solve_group


@dataclass(frozen=True, eq=False)
class Initialized:
    """Q of a linear, and its factors; None where no adapter is on it.

    before, after: the objective 1/2 tr(E H Eᵀ) of E = W - Q, and of E - A Bᵀ, after each alternation.
    more_damping: λ of error feedback, where it is more than was asked for.
    """

    quantized: QuantizedWeight
    factors: LoraFactors | None
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    more_damping: float | None = None


class QuantizeAndSolve(Protocol):
    """What the loop calls for linears that share an input.

    weights: W (m, n) by name; it may overwrite them if `overwrite`. ranks: of the linears that an adapter is on.
    """

    def __call__(
        self, weights: Mapping[str, Tensor], ranks: Mapping[str, int], gram: Gram, *, overwrite: bool
    ) -> dict[str, Initialized]: ...

    def quantized(self, name: str, weight: Tensor) -> QuantizedWeight:
        """Q of a linear whose inputs are not known."""


@dataclass(frozen=True)
class GivenQ:
    """Q comes from `quantized_weight`, which gives it for a name and W: read from a model, or rounded to nearest."""

    quantized_weight: Callable[[str, Tensor], QuantizedWeight]
    solver: SolverConfig
    stages: Stages

    def __call__(
        self, weights: Mapping[str, Tensor], ranks: Mapping[str, int], gram: Gram, *, overwrite: bool
    ) -> dict[str, Initialized]:
        with self.stages("quantize"):
            quantized = {name: self.quantized_weight(name, weight) for name, weight in weights.items()}
        with self.stages("solve"):
            factors = solve(weights, quantized, ranks, gram, self.solver, overwrite=overwrite)
        return {name: Initialized(quantized[name], factors.get(name)) for name in weights}

    def quantized(self, name: str, weight: Tensor) -> QuantizedWeight:
        return self.quantized_weight(name, weight)


@dataclass(frozen=True)
class CalibratedQ:
    """Q and the factors are found in turn: Q is W - A Bᵀ rounded with error feedback, A and B solve for W - Q (CLoQ,
    arXiv 2501.18475, alternated as LoftQ, arXiv 2310.08659, alternates). With MagR, extremes of W are reduced before it
    is rounded, and A and B solve for W as it is. What left the least is taken, linear by linear, so that more
    alternations are never worse on the calibration data. The first Q is no worse there than nearest rounding either,
    before the factors; with them it may be.
    """

    base: QuantizedBase
    rounding: RoundingConfig
    solver: SolverConfig
    stages: Stages

    def __call__(
        self, weights: Mapping[str, Tensor], ranks: Mapping[str, int], gram: Gram, *, overwrite: bool
    ) -> dict[str, Initialized]:
        h = gram.matrix()
        with self.stages("quantize"):
            curvature = Curvature.of(h, self.rounding.damping)
            more = curvature.damping if curvature.damping > self.rounding.damping else None
            rounded = {name: self._reduced(weight, h) for name, weight in weights.items()}
            quantized = {
                name: self._round(name, weight, rounded[name], curvature, h) for name, weight in weights.items()
            }
        found = {name: Initialized(q, None, more_damping=more) for name, q in quantized.items()}
        adapted = {name: weight for name, weight in weights.items() if name in ranks}
        for step in range(self.rounding.alternations + 1 if adapted else 0):
            if step > 0:
                with self.stages("quantize"):
                    quantized = {name: self._round_rest(rounded[name], found[name], curvature) for name in adapted}
            with self.stages("solve"):
                factors = solve(adapted, quantized, ranks, gram, self.solver, overwrite=False)
            for name, of_one in factors.items():
                known = found[name]
                better = known.factors is None or of_one.objective < known.factors.objective
                found[name] = Initialized(
                    quantized[name] if better else known.quantized,
                    of_one if better else known.factors,
                    (*known.before, of_one.initial),
                    (*known.after, of_one.objective),
                    more,
                )
        return found

    def quantized(self, name: str, weight: Tensor) -> QuantizedWeight:
        return self.base.quantize(weight)

    def _reduced(self, weight: Tensor, h: Tensor) -> Tensor:
        if not self.rounding.magr:
            return weight
        return reduce_magnitude(weight, h, group=self.base.group_of(weight.shape[1]), strength=self.rounding.magr)

    def _round(self, name: str, weight: Tensor, rounded: Tensor, curvature: Curvature, h: Tensor) -> QuantizedWeight:
        try:
            fed_back = self.base.calibrated(rounded, curvature)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        nearest = self.base.calibrated(weight, curvature.without_feedback())
        return min(fed_back, nearest, key=lambda q: _energy(weight, q, h))

    def _round_rest(self, weight: Tensor, known: Initialized, curvature: Curvature) -> QuantizedWeight:
        assert known.factors is not None
        rest = torch.addmm(weight.float(), known.factors.A, known.factors.B.T, alpha=-1)
        return self.base.calibrated(rest, curvature)


def solve(
    weights: Mapping[str, Tensor],
    quantized: Mapping[str, QuantizedWeight],
    ranks: Mapping[str, int],
    gram: Gram,
    solver: SolverConfig,
    *,
    overwrite: bool,
) -> dict[str, LoraFactors]:
    """The factors of the linears that have a rank."""
    names = [name for name in weights if name in ranks]
    if not names:
        return {}
    linears: Sequence[Linear] = [Linear(weights[name], quantized[name], ranks[name], name) for name in names]
    return dict(zip(names, solve_group(linears, gram, solver, overwrite_weights=overwrite), strict=True))


def _energy(weight: Tensor, quantized: QuantizedWeight, h: Tensor) -> float:
    """tr(E H Eᵀ)."""
    return float(ops.gram_energy(h, weight.float() - quantized.dequantize().float()))
