"""How the codes of a base are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Self

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

    Raises AdapterError for another rounding, or a value of another type or out of range.
    """

    rounding: str = CALIBRATED
    damping: float = DEFAULT_DAMPING
    alternations: int = DEFAULT_ALTERNATIONS

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

    @classmethod
    def given(cls, rounding: str | None, damping: float | None, alternations: int | None, *, written: bool) -> Self:
        """From arguments that may be left out.

        written: whether the base is written, so that its codes may be chosen by calibration.

        Raises AdapterError as the class does, and for settings of calibrated rounding without it.
        """
        rounding = rounding or (CALIBRATED if written else NEAREST)
        settings = {
            name: value for name, value in (("damping", damping), ("alternations", alternations)) if value is not None
        }
        found = cls(rounding, **settings)  # type: ignore[arg-type]
        if rounding == CALIBRATED and not written:
            raise AdapterError(
                "calibrated codes do not follow from the weights, so that their base has to be written: give "
                "base_output (--base-output)"
            )
        if rounding == NEAREST and settings:
            name = "alternations (--alternations)" if damping is None else "rounding_damping (--rounding-damping)"
            rest = (
                "take rounding='calibrated' (--rounding calibrated)" if written else "give base_output (--base-output)"
            )
            raise AdapterError(
                f"{name} is of calibrated rounding, and this is rounded to nearest: {rest}, or leave it out"
            )
        return found
