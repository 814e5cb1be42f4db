"""Which solver runs, and with what settings."""

import difflib
import math
from dataclasses import dataclass

from quailora.errors import SolverError
from quailora.solvers.registry import SOLVERS

# Chosen with benchmarks/kernels/damping.py: the lowest perplexity on held-out text, with little calibration data and
# with much.
DEFAULT_DAMPING = 1e-4


@dataclass(frozen=True)
class SolverConfig:
    """The settings of a solver. `quailora.solve` explains each.

    Raises:
        SolverError: there is no such solver (the message names the closest), or it does not take these settings.
    """

    name: str = "krylov"
    iterations: int | None = None  # None: the solver's own default
    damping: float = DEFAULT_DAMPING
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            closest = difflib.get_close_matches(self.name, SOLVERS, n=1)
            hint = f"did you mean {closest[0]!r}? " if closest else ""
            raise SolverError(f"unknown solver (--solver) {self.name!r}; {hint}there are {', '.join(SOLVERS)}")
        if self.iterations is not None and SOLVERS[self.name].iterations is None:
            raise SolverError(f"solver {self.name!r} takes no iterations (--iterations), got {self.iterations}")
        if self.iterations is not None and not (isinstance(self.iterations, int) and self.iterations >= 0):
            raise SolverError(f"iterations (--iterations) must be a whole number >= 0, got {self.iterations!r}")
        if not (isinstance(self.damping, int | float) and math.isfinite(self.damping) and self.damping >= 0):
            raise SolverError(f"damping (--damping) must be finite and >= 0, got {self.damping!r}")
        if not isinstance(self.seed, int):
            raise SolverError(f"seed (--seed) must be a whole number, got {self.seed!r}")

    @property
    def steps(self) -> int:
        """How many iterations are run: 0 for a solver that has none."""
        return (SOLVERS[self.name].iterations or 0) if self.iterations is None else self.iterations
