"""What the loop has found for a linear."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from quailora.modeling.blocks import linear_weight
from quailora.pipeline.quantize import Initialized, QuantizeAndSolve
from quailora.quantization.protocol import QuantizedWeight
from quailora.quantization.verify import digest
from quailora.reporting.report import LayerReport
from quailora.solvers.solve import LoraFactors


@dataclass(frozen=True, eq=False)
class Solved:
    """A linear that has its Q, which is kept if a base is written, and its factors if an adapter is on it; on the
    CPU."""

    name: str
    digest: str
    quantized: QuantizedWeight | None = None
    factors: LoraFactors | None = None
    row: LayerReport | None = None


def layer_report(
    name: str, found: Initialized, tokens: int, seconds: float, digest: str, *, quantized_inputs: bool
) -> LayerReport:
    factors = found.factors
    assert factors is not None

    def per_token(objective: float) -> float:
        return math.sqrt(2 * objective / tokens)

    return LayerReport(
        name=name,
        outputs=len(factors.A),
        inputs=len(factors.B),
        rank=factors.A.shape[1],
        tokens=tokens,
        weight_error=factors.error_norm,
        weight_error_after=factors.residual_norm,
        output_error=per_token(factors.initial),
        output_error_after=per_token(factors.objective),
        jitter=factors.jitter,
        seconds=seconds,
        nuclear_norm=float(factors.A.square().sum()),  # A and B are balanced
        digest=digest,
        more_damping=found.more_damping,
        alternations=[
            [per_token(before), per_token(after)] for before, after in zip(found.before, found.after, strict=True)
        ],
        quantized_inputs=quantized_inputs,
    )


def unreached(name: str, linear: nn.Module, initialize: QuantizeAndSolve) -> Solved:
    """A linear that no token reached, rounded to nearest or read."""
    quantized = initialize.quantized(name, linear_weight(linear)).to(torch.device("cpu"))
    return Solved(name, digest(quantized), quantized)
