"""How the codes of a base are chosen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Self

from quailora.errors import AdapterError
from quailora.quantization.verify import CALIBRATED, NEAREST

# Damping is far above GPTQ's 0.01: feedback that fits the calibration inputs closely moves its errors to directions
# that training then uses.
DEFAULT_DAMPING, DEFAULT_ALTERNATIONS = 0.1, 2

FULL, QUANTIZED = "full", "quantized"
DEFAULT_INPUTS = QUANTIZED  # of calibrated rounding


@dataclass(frozen=True)
class RoundingConfig:
    """The settings of rounding.

    rounding: "calibrated", with error feedback (`quantization.feedback`), or "nearest".
    damping: λ: feedback works with H + λ · mean(diag H) · I. The larger, the nearer to nearest rounding.
    alternations: how often Q is found anew for W - A Bᵀ, and A, B for it.
    magr: the strength of `quantization.magr`, which makes the extremes of W smaller before it is rounded; 0 is without.
    inputs: what Q and the factors are fitted on: "full", the inputs that a linear has in the full-precision model, or
        "quantized", those that it has behind quantized layers, with a target that undoes part of what those left
        (`calibration.inputs`).

    Raises AdapterError for another rounding or other inputs, a value of another type or out of range, and for quantized
    inputs without calibrated rounding.
    """

    rounding: str = CALIBRATED
    damping: float = DEFAULT_DAMPING
    alternations: int = DEFAULT_ALTERNATIONS
    magr: float = 0.0
    inputs: str = FULL

    def __post_init__(self) -> None:
        if self.rounding not in (NEAREST, CALIBRATED):
            raise AdapterError(f"rounding={self.rounding!r} (--rounding): it is {NEAREST!r} or {CALIBRATED!r}")
        damping, alternations = self.damping, self.alternations
        if not isinstance(damping, Real) or not (math.isfinite(damping) and damping > 0):
            raise AdapterError(f"rounding_damping (--rounding-damping) must be a number above 0, got {damping!r}")
        if not isinstance(alternations, Integral) or alternations < 0:
            raise AdapterError(
                f"alternations (--alternations) must be a whole number and at least 0, got {alternations!r}"
            )
        if not isinstance(self.magr, Real) or not 0 <= self.magr < math.inf:
            raise AdapterError(f"magr (--magr) must be a number and at least 0, got {self.magr!r}")
        if self.inputs not in (FULL, QUANTIZED):
            raise AdapterError(f"inputs={self.inputs!r} (--inputs): it is {FULL!r} or {QUANTIZED!r}")
        if self.inputs == QUANTIZED and self.rounding == NEAREST:
            raise AdapterError(
                "inputs='quantized' (--inputs quantized) takes codes that are chosen by calibration; those of nearest "
                "rounding do not depend on the inputs, and the factors alone gain little by it: write the base with "
                "rounding='calibrated' (--rounding calibrated), or leave it out and take refine='blocks' "
                "(--refine blocks)"
            )

    @classmethod
    def given(cls, rounding: str | None, *, written: bool, **settings: Any) -> Self:
        """From arguments that may be None, for the defaults.

        written: whether the base is written, so that its codes may be chosen by calibration.
        settings: the other fields.

        Raises AdapterError as the class does, and for settings of calibrated rounding without it.
        """
        rounding = rounding or (CALIBRATED if written else NEAREST)
        known = {name: value for name, value in settings.items() if value is not None}
        inputs = known.pop("inputs", DEFAULT_INPUTS if rounding == CALIBRATED else FULL)
        found = cls(rounding, **known, inputs=inputs)
        if rounding == CALIBRATED and not written:
            raise AdapterError(
                "calibrated codes do not follow from the weights, so that their base has to be written: give "
                "base_output (--base-output)"
            )
        if rounding == NEAREST and known:
            rest = (
                "take rounding='calibrated' (--rounding calibrated)" if written else "give base_output (--base-output)"
            )
            raise AdapterError(
                f"{_ARGUMENTS[next(iter(known))]} is of calibrated rounding, and this is rounded to nearest: {rest}, "
                "or leave it out"
            )
        return found

    def settings(self) -> dict[str, Any]:
        """Those of calibrated rounding, for the record."""
        return {name: value for name, value in asdict(self).items() if name in _ARGUMENTS}


_ARGUMENTS = {
    "damping": "rounding_damping (--rounding-damping)",
    "alternations": "alternations (--alternations)",
    "magr": "magr (--magr)",
    "inputs": "inputs (--inputs)",
}
