"""Whether and how factors are refined."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass
from typing import Any

from quailora.errors import QuailoraError

BLOCKS, MODEL = "blocks", "model"
BLOCKS_INSTEAD = (
    "refine blocks while they are solved: build_adapter(..., refine='blocks') (quailora init --refine blocks)"
)
# Defaults that differ from those of blocks.
_OF_A_MODEL: dict[str, Any] = {"tokens": 1024, "patience": 3}


@dataclass(frozen=True)
class RefinementConfig:
    """The settings of refinement; those of blocks are chosen by held-out perplexity.

    level: "blocks": the factors of a block together, for its output. "model": those of the whole model, for its
        distribution of the next token.
    steps: of Adam, for each block or for the model.
    rate: Adam's largest learning rate: after a warm-up it falls linearly to 0. Of a model it is a share of the root
        mean square of each linear's factors: the more error there is to correct, the larger they are.
    tokens: in one step, about; at least one sequence of every process.
    held_out: every so many steps' worth of data is kept for measuring; of a model, every so many sequences.
    every: steps between measurements. Refinement ends early when `patience` of them in a row are no better.
    prefix: what the caller has before the names of these settings, for errors.

    Raises QuailoraError for another level or values out of range.
    """

    level: str = BLOCKS
    steps: int = 48
    rate: float = 1e-3
    tokens: int = 2048
    held_out: int = 16
    every: int = 12
    patience: int = 2
    warmup: int = 6
    prefix: InitVar[str] = "refine_"

    def __post_init__(self, prefix: str) -> None:
        if self.level not in (BLOCKS, MODEL):
            raise QuailoraError(f"refine={self.level!r} (--refine): it is {BLOCKS!r} or {MODEL!r}")
        if type(self.steps) is not int or self.steps < 1:
            raise QuailoraError(f"{_named(prefix, 'steps')} must be a whole number, at least 1; got {self.steps!r}")
        if type(self.rate) not in (int, float) or not (math.isfinite(self.rate) and self.rate > 0):
            raise QuailoraError(f"{_named(prefix, 'rate')} must be a number above 0, got {self.rate!r}")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        return self.rate * min(1.0, step / self.warmup) * (self.steps - step + 1) / self.steps


def refinement_config(refine: str | None, steps: int | None, rate: float | None) -> RefinementConfig | None:
    """From the arguments of `build_adapter`; None without `refine`. Raises QuailoraError."""
    if refine is None:
        if steps is not None or rate is not None:
            name = "rate" if steps is None else "steps"
            raise QuailoraError(f"{_named('refine_', name)} goes with refine (--refine): give that too")
        return None
    return _config(refine, steps, rate)


def refine_config(steps: int | None, rate: float | None) -> RefinementConfig:
    """From the arguments of `refine`. Raises QuailoraError."""
    return _config(MODEL, steps, rate, prefix="")


def _config(level: str, steps: int | None, rate: float | None, **options: Any) -> RefinementConfig:
    given = {name: value for name, value in (("steps", steps), ("rate", rate)) if value is not None}
    return RefinementConfig(level, **(_OF_A_MODEL if level == MODEL else {}) | given | options)


def _named(prefix: str, name: str) -> str:
    """As Python and the command line have it: "refine_steps (--refine-steps)"."""
    return f"{prefix}{name} (--{prefix.replace('_', '-')}{name})"


def by_level(config: RefinementConfig | None) -> tuple[RefinementConfig | None, RefinementConfig | None]:
    """How blocks are refined while they are solved, and how the whole model is afterwards; None where not."""
    if config is None or config.level == BLOCKS:
        return config, None
    return None, config
