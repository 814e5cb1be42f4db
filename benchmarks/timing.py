"""How the benchmarks take time: candidates run in turn, so that what else the machine does strikes them all alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch


@dataclass(frozen=True)
class Timing:
    """The seconds that each round took, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The range of the middle half of the rounds, relative to the median."""
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def over(self, other: "Timing") -> float:
        """How many times as long as `other`: the median of the ratios, each of runs that followed one another."""
        return median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, Timing]:
    """Run each of `candidates` once unmeasured, then `rounds` rounds of one run each; at least two."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-1, rounds):
        for name, run in candidates.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
