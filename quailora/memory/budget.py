"""The memory budget of a run: parsing and printing amounts, free memory, and the measured peak."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch

from quailora.errors import CalibrationError, QuailoraError
from quailora.memory.allocator import freed_at_once, return_freed_memory

_UNITS = {"": 1, "B": 1} | {f"{letter}{binary}B": (1024 if binary else 1000) ** power
                            for power, letter in enumerate("KMGT", 1) for binary in ("i", "")}  # fmt: skip

# With a fragmented heap the peak is at most this many times what was planned: 1.6 was measured. With more room than
# that the heap is left as it is, which is faster.
_FRAGMENTED = 2

OF_FREE = 0.9  # of free memory, by default: other processes may need some


@dataclass(frozen=True)
class MemoryConfig:
    """How much memory a run may use; see `build_adapter`.

    Raises QuailoraError for anything that is not an amount of memory, CalibrationError for a batch size below 1.
    """

    memory_budget: int | str | None = None
    host_memory_budget: int | str | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _ = self.device_bytes, self.host_bytes
        if self.batch_size is not None and self.batch_size < 1:
            raise CalibrationError(f"batch_size (--batch-size) must be at least 1, got {self.batch_size}")

    @property
    def device_bytes(self) -> int | None:
        name = "memory_budget (--memory-budget)"
        return None if self.memory_budget is None else parse_bytes(self.memory_budget, name)

    @property
    def host_bytes(self) -> int | None:
        name = "host_memory_budget (--host-memory-budget)"
        return None if self.host_memory_budget is None else parse_bytes(self.host_memory_budget, name)


class Meter:
    """Created at the start of a run: memory is counted from there.

    On a GPU the budget limits by how much torch's allocator may grow, and is enforced within the `with`. On a CPU it
    limits by how much the resident memory of the process may grow; the plan keeps to it, but nothing enforces it. Its
    peak is measured where `reset_peak` can set it back, which is on Linux.
    """

    def __init__(self, device: torch.device, config: MemoryConfig) -> None:
        self.device, self.config = device, config
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this host
        sharing = 1 if device.type == "cuda" else processes
        cpu = torch.device("cpu")
        self.budget = int(config.device_bytes or OF_FREE * free_memory(device) / sharing)
        self.host_budget = int(config.host_bytes or OF_FREE * free_memory(cpu) / processes)
        self._limits_the_host = device.type == "cpu" and config.memory_budget is not None
        self._tight = False
        self._measured = device.type == "cuda" or reset_peak()
        self._start = self._held()
        self._peak: int | None = None
        self._heap = ExitStack()

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """For making models on the meta device: each parameter is on the CPU for a moment, and the gaps left in the
        heap would grow with the depth. Before there is a plan, any budget given for a CPU counts as tight."""
        with freed_at_once() if self._limits_the_host else nullcontext():
            yield

    def held(self) -> int:
        """Bytes of the budget that are already in use."""
        if self._limits_the_host:
            return_freed_memory()
        return max(0, self._held() - self._start)

    def expect(self, planned: int) -> None:
        """Set the planned peak. A budget on a CPU is tight if a fragmented heap could exceed it."""
        self._tight = self._limits_the_host and _FRAGMENTED * planned > self.budget

    def trim(self) -> None:
        """Return freed memory to the operating system if the budget is tight."""
        if self._tight:
            return_freed_memory()

    def figures(self, planned: int) -> dict[str, int]:
        """Bytes, for the report. The measured peak is left out where it is not known."""
        peak = {} if self._peak is None else {"measured peak": self._peak}
        return {"budget": self.budget, "planned peak": planned} | peak

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
            self._peak = max(0, peak_resident() - self._start) if self._measured else None
            self._heap.close()

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return psutil.Process().memory_info().rss


@contextmanager
def memory_errors(device: torch.device, advice: str) -> Iterator[None]:
    """Within it, a device that runs out of memory is a QuailoraError with `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuailoraError(f"{device} is out of memory: {advice}. {' '.join(str(error).split())[:200]}") from error


def reset_peak() -> bool:
    """Set the peak of this process's resident memory to what is resident now; whether that could be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)
    except OSError:  # not Linux, or not allowed here
        return False
    return True


def peak_resident() -> int:
    """The most bytes that were resident since `reset_peak` succeeded."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def parse_bytes(text: str | int, name: str = "") -> int:
    """ "12GiB" -> 12 * 2**30. Units KiB to TiB and KB to TB, in any case; a plain number is bytes.

    Raises QuailoraError, which begins with `name`, for anything else, and for less than one byte.
    """
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    size = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if size < 1:
        given = f"{name} '{text}'".lstrip()
        raise QuailoraError(f"{given} is not an amount of memory: write 12GiB, 800MB or a number of bytes")
    return size


def about(seconds: float) -> str:
    """An estimate: "about 40 s", "about 12 min" or "about 5 h 07 min"."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes:02} min" if hours else f"about {minutes} min"


def describe_bytes(size: int) -> str:
    """Such as "12.5 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= (one := _UNITS[unit]):
            return f"{size / one:.3g} {unit}" if size < 1000 * one else f"{size // one} {unit}"
    return f"{size} B"


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated: of a GPU's memory, or of the host's within the process's control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left_in_groups(Path("/sys/fs/cgroup"))])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Limit less usage, of every control group (version 2 or 1) that this process is in."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit, usage = (
            (root, "memory.max", "memory.current")
            if controllers == ""
            else (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):  # in a container this may be the host's path; the top one exists
            try:
                allowed, used = (group / limit).read_text().strip(), int((group / usage).read_text())
                # The kernel reclaims pages of files when needed. Version 1 counts those of subgroups separately.
                stat = (group / "memory.stat").read_text()
                reclaimable = re.findall(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)[-1:]
                if allowed.isdigit():
                    yield max(0, int(allowed) - used + sum(map(int, reclaimable)))
            except (OSError, ValueError):
                pass  # no such group here
            if group == top:
                break
