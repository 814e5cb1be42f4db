"""The memory budget of a run: what there is, the plan for it, and what was really taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import psutil
import torch

from quailora.adapters.lora import Target
from quailora.calibration.data import Calibration
from quailora.memory.allocator import freed_at_once
from quailora.memory.planner import Plan, free_memory, make_plan, parse_bytes
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.distributed import Processes
from quailora.quantization.protocol import QuantizedBase
from quailora.solvers.config import SolverConfig

# How many times the planned peak a heap with gaps comes to: 1.6 were measured. With more room than that, time is saved.
_WITH_GAPS = 2

_OF_FREE = 0.9  # what is taken of free memory by itself: others may come to need some


class Meter:
    """Made where a run begins: memory counts from there.

    On a GPU the budget is what torch's allocator may hold more than it does now; it is enforced within the `with`. On a
    CPU it is how much the resident memory of the process may grow, which the plan keeps to and nothing enforces.
    """

    def __init__(
        self, device: torch.device, memory_budget: int | str | None, host_memory_budget: int | str | None
    ) -> None:
        self.device = device
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share the host
        own = 1 if device.type == "cuda" else beside
        self.budget = _bytes(memory_budget) or int(_OF_FREE * free_memory(device) / own)
        self.host_budget = _bytes(host_memory_budget) or int(_OF_FREE * free_memory(torch.device("cpu")) / beside)
        self._named, self._tight = memory_budget is not None, False
        self._start = self._held()
        self._peak = 0
        self._heap = ExitStack()

    def plan(
        self,
        stream: StreamedModel,
        targets: Sequence[Target],
        form: QuantizedBase,
        settings: SolverConfig,
        data: Calibration,
        processes: Processes,
        batch_size: int | None,
        timed: bool = False,
    ) -> Plan:
        """The fastest plan that fits, the same for all processes; if `timed`, with an estimate of the time. Raises
        BudgetError."""
        plan = make_plan(
            stream,
            {target.name: target.rank for target in targets},
            form,
            settings,
            samples=-(-len(data) // processes.size),
            sequence_length=data.longest,
            memory_budget=processes.minimum(self.budget),
            host_memory_budget=processes.minimum(self.host_budget),
            batch_size=batch_size,
            held=-processes.minimum(-max(0, self._held() - self._start)),
            timed=timed,
        )
        self._tight = self._named and _WITH_GAPS * plan.peak > self.budget
        return plan

    def figures(self, plan: Plan) -> dict[str, int]:
        """Bytes, for the report."""
        return {"budget": self.budget, "planned peak": plan.peak, "measured peak": self._peak}

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            self._fraction = torch.cuda.get_per_process_memory_fraction(self.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, (self._start + self.budget) / total), self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._tight:
            self._heap.enter_context(freed_at_once())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(self._fraction, self.device)
            self._peak = torch.cuda.max_memory_reserved(self.device) - self._start
        else:
            self._peak = max(0, _highest_resident() - self._start)
            self._heap.close()

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return psutil.Process().memory_info().rss


def _bytes(budget: int | str | None) -> int | None:
    return parse_bytes(budget) if isinstance(budget, str) else budget


def _highest_resident() -> int:
    """The most that was resident since the process began, bytes."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
