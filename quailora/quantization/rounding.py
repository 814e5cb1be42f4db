"""How the codes of a base are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quailora.errors import AdapterError
from quailora.quantization.verify import CALIBRATED, NEAREST

# Damping is far above GPTQ's 0.01: feedback that fits the calibration inputs closely moves its errors to directions
# that training then uses.
DEFAULT_DAMPING, DEFAULT_ALTERNATIONS = 0.1, 2


@dataclass(frozen=True)
class RoundingConfig:
    """The settings of rounding.

    rounding: "calibrated", with error feedback (`quantization.feedback`), or "nearest".
    damping: λ: feedback works with H + λ · mean(diag H) · I. The larger, the nearer to nearest rounding.
    alternations: how often Q is found anew for W - A Bᵀ, and A, B for it.

    Raises AdapterError for another rounding or values out of range.
    """

    rounding: str = CALIBRATED
    damping: float = DEFAULT_DAMPING
    alternations: int = DEFAULT_ALTERNATIONS

    def __post_init__(self) -> None:
        if self.rounding not in (NEAREST, CALIBRATED):
            raise AdapterError(f"rounding={self.rounding!r} (--rounding): it is {NEAREST!r} or {CALIBRATED!r}")
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise AdapterError(f"rounding_damping (--rounding-damping) must be above 0, got {self.damping}")
        if self.alternations < 0:
            raise AdapterError(f"alternations (--alternations) must be at least 0, got {self.alternations}")
