"""How the benchmarks measure time: candidates run in turn, so that other load on the machine affects all of them alike.

Wrong results are not timed (`require`), times are compared with a counted floor (`copy_rate`, `product_rate`), and
saved results say where they were measured (`keep`).
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import torch

import quailora
from quailora.modeling.devices import default_device


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

    def __str__(self) -> str:
        """The median ± half the spread."""
        shown = f"{self.median:.3g} s" if self.median >= 0.1 else f"{1e3 * self.median:.3g} ms"
        return f"{shown} ± {50 * self.spread:.0f} %"

    def over(self, other: "Timing") -> float:
        """The ratio to the time of `other`: the median over rounds of the ratio within a round."""
        return median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, Timing]:
    """Run each of `candidates` once untimed, then in `rounds` rounds (two or more), once in each."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-1, rounds):
        for name, run in candidates.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def wait() -> None:
    """For all that is queued on the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def require(value: float, allowed: float, what: str) -> None:
    """End the program unless `value`, an error, is within ± `allowed`."""
    if not abs(value) <= allowed:  # NaN is not
        sys.exit(f"{what} is off by {value:.3g}, and {allowed:.3g} is allowed: nothing is timed")


# ---- What a device can do


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second that a copy of `size` bytes moves, reads and writes counted."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / alternate({"copy": lambda: target.copy_(source)})["copy"].median


def product_rate(device: torch.device, side: int) -> float:
    """FLOPs per second of torch's product of two square matrices, in bf16 or fp32, whichever is faster."""
    squares = [torch.randn(side, side, device=device).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    timings = alternate({str(square.dtype): partial(torch.matmul, square, square) for square in squares})
    return 2 * side**3 / min(timing.median for timing in timings.values())


# ---- Records


def describe(device: torch.device) -> str:
    """What two runs must have in common for their times to be comparable."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def circumstances(device: torch.device | None = None) -> dict[str, Any]:
    """Versions and machine, for a record of something that ran on `device`; by default a GPU, if there is one."""
    device = device or default_device(None)
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "quailora": quailora.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "bf16_products": quailora.backends(device)["bf16_products"].backend,
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
    }


def keep(path: Path | None, device: torch.device, record: Mapping[str, Any]) -> None:
    """Write `record` as JSON, with versions and machine; does nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(circumstances(device) | {"device": describe(device)} | dict(record), indent=1) + "\n")
