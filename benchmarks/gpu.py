"""What tells the most about a GPU that quailora has not been seen on, the most valuable first, within 8 minutes.

    QUAILORA_EXT=1 python -m pip install --no-build-isolation --no-deps -e .    # with CUDA_HOME set: kernels for H too
    python benchmarks/gpu.py [--json gpu.json] [--minutes 8] [--only kernels ...]

    kernels   compile, and compute what the reference does
    H         the compiled kernel against torch's products
    solve     a block of Llama-2-7B: time, launches and memory against plain PyTorch, and what the time goes into
    build     a run on the GPU against one on the CPU; the allocator's peak against the budget
    tests     pytest -m gpu

Each step is a process of its own with a limit of its own, so that one that hangs or dies costs no other its turn. The
JSON is written after each of them; it holds every figure, and the end of what a step printed. --dry-run goes through
all of it on a CPU, with tiny sizes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import quailora
from benchmarks.common import smollm2
from benchmarks.common.timing import Timing, circumstances, copy_rate, describe, wait
from benchmarks.end_to_end import initialize, memory
from benchmarks.kernels import gram, solver
from quailora import ops
from quailora.calibration.data import Calibration
from quailora.doctor import examine
from quailora.ops.precision import exact_products

ROOT = Path(__file__).resolve().parents[1]
LOG = 3000  # characters of what a step printed

Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Where and how large. Sizes of Llama 2 are divided by `divisor`."""

    device: torch.device
    divisor: int
    checked: Sequence[int]  # features of the kernels that are checked
    features: Sequence[int]  # of H
    tokens: int  # that H is of
    side: int  # of the squares whose product is the peak
    size: str  # of the model
    budget: str
    samples: int
    length: int
    slack: float  # times the limits


FULL = Scale(
    torch.device("cuda", 0), 1, (64, 256, 1000), (4096, 11008), 8192, 8192, "7b-blocks", "6GiB", 32, 2048, slack=1
)
DRY = Scale(torch.device("cpu"), 64, (64,), (48, 64), 40, 64, "tiny", "1GiB", 2, 16, slack=10)


# ---- Steps: each returns its figures, and raises or exits where something is wrong


def kernels(scale: Scale) -> Figures:
    found = [each for size in scale.checked for each in examine(scale.device, size=size)]
    for finding in found:
        if not finding.sound:
            print(f"{finding.operation} by {finding.backend}, {finding.case}: {finding.raised or finding.error}")
    backends = {finding.operation: finding.backend for finding in found}
    sound = sum(finding.sound for finding in found)
    if sound < len(found):
        raise SystemExit(f"{len(found) - sound} of {len(found)} cases are wrong")
    return {"sound": sound, **{f"{operation} by": backend for operation, backend in backends.items()}}


def h(scale: Scale) -> Figures:
    figures: Figures = {"ours": ops.backends(scale.device)["gram_"].backend}
    dtypes = (torch.bfloat16, torch.float32)
    squares = {dtype: torch.randn(scale.side, scale.side, device=scale.device).to(dtype) for dtype in dtypes}
    with exact_products(scale.device):
        rate = copy_rate(scale.device, 4 * scale.side**2)
        for dtype in dtypes:
            for n in scale.features:
                x = torch.randn(scale.tokens, n, device=scale.device).to(dtype)
                row = gram.measure(ops.gram_, x, squares, rate, rounds=5)
                name = f"{row['dtype']}, n = {n}"
                for candidate in ("ours", "addmm", "mm to fp32"):
                    if candidate in row["seconds"]:
                        taken = Timing(tuple(row["seconds"][candidate])).median
                        figures[f"{name}: {candidate}, TFLOP/s of the triangle"] = row["flops"] / taken / 1e12
                figures[f"{name}: share of torch's product"] = row["shares"]["matmul"]
                figures[f"{name}: error"] = row["error"]
    return figures | {"copy, GB/s": rate / 1e9}


def solve(scale: Scale) -> Figures:
    figures: Figures = {}
    candidates, missing = solver.available(scale.device)
    chosen = {name: each for name, each in candidates.items() if name in ("fused", "torch fp32", "whole")}
    with exact_products(scale.device):
        solver.check(chosen, "krylov", 64, scale.device)
        rate = copy_rate(scale.device, 2**24)
        parts: dict[str, float] = dict.fromkeys(initialize.PARTS, 0.0)
        for group in solver.groups("7b", scale.divisor):
            case = solver.Case.draw(group, 64, scale.device)
            for row in solver.measure(case, "krylov", chosen, rounds=3, rate=rate):
                figures[f"{group.name}: {row['candidate']}, ms"] = 1e3 * row["seconds"]
                if row["peak_bytes"] is not None:
                    figures[f"{group.name}: {row['candidate']}, peak MB"] = row["peak_bytes"] / 1e6
            run = partial(chosen["whole"].run, case, "krylov")
            case.restore()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + case.gram.is_cuda]) as seen:
                run()
                wait()
            launches = sum(event.count for event in seen.key_averages() if "LaunchKernel" in event.key)
            figures[f"{group.name}: launches"] = launches
            of_group: dict[str, float] = {}
            case.restore()
            with initialize.timed(of_group):
                run()
            parts = {part: seconds + of_group[part] for part, seconds in parts.items()}
    figures |= {f"the block: {part}, ms": 1e3 * seconds for part, seconds in parts.items() if seconds}
    return figures | {f"not run: {name}": reason for name, reason in missing.items()}


def build(scale: Scale) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        small = smollm2.default_cache()
        if scale is DRY or not small.is_dir():
            memory.write_model(small := Path(folder) / "small", memory.SIZES["tiny"])
        found, expected = (errors_left(small, device) for device in (scale.device, torch.device("cpu")))
        off = max(abs(mine - its) for mine, its in zip(found, expected, strict=True))
        if off > 0.02:  # forward passes in bf16 round differently
            raise SystemExit(f"errors differ from those on the CPU by up to {off:.2g} of what they were at first")
        model = Path(folder) / "model"
        memory.write_model(model, memory.SIZES[scale.size])
        taken = memory.measure(
            model, scale.samples, scale.length, 64, memory.TARGETS, scale.budget, device=scale.device
        )
    figures: Figures = {"largest difference to the CPU": off}
    figures |= {f"{name}, GiB": taken[name] / 2**30 for name in ("budget", "planned", "measured")}
    return figures | {f"{stage}, s": seconds for stage, seconds in taken["stages"].items()}


def errors_left(model: Path, device: torch.device) -> list[float]:
    """What is left of the output error of each linear."""
    tokens = torch.randint(2, 512, (4, 128), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        data, output = Calibration(tuple(tokens), "random tokens"), Path(folder) / "adapter"
        report = quailora.build_adapter(model, None, data, output, device=device, progress=False)
    return [layer.output_error_after / layer.output_error for layer in report.layers if layer.output_error > 0]


def tests(scale: Scale) -> Figures:
    # Without the project's settings, which older releases of pytest do not know.
    settings = ["-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib", "-p", "no:cacheprovider", "-q"]
    files = ["tests/kernels/test_gpu.py", "tests/integration/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", *settings, "-m", "gpu", *files]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(run.stdout)
    if run.returncode:
        raise SystemExit(run.stdout.strip().splitlines()[-1])
    return {"pytest": run.stdout.strip().splitlines()[-1]}


# Step -> what it does, and its limit in seconds.
STEPS: dict[str, tuple[Callable[[Scale], Figures], float]] = {
    "kernels": (kernels, 120), "H": (h, 60), "solve": (solve, 100), "build": (build, 120), "tests": (tests, 150),
}  # fmt: skip


# ---- Run within their limits


def run(command: Sequence[str], limit: float) -> tuple[str, str]:
    """How the command ended, and what it printed. It is killed after `limit` seconds with all that it started."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(limit)
            status = "done" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = f"stopped after {limit:.0f} s"
        output.seek(0)
        return status, output.read()


def measure(names: Sequence[str], minutes: float, scale: Scale, keep: Callable[[Figures], None]) -> Figures:
    """The record of all steps; `keep` gets it after each."""
    start = perf_counter()
    record: Figures = {"steps": {}}
    for name in names:
        left = scale.slack * 60 * minutes - (perf_counter() - start)
        before = perf_counter()
        figures: Figures = {}
        status, printed = "no time left", ""
        if left > 1:
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "figures.json"
                # -P: beside this file is a folder `kernels`, which would answer transformers' `import kernels`.
                command = [sys.executable, "-P", __file__, "--step", name, "--json", str(result)]
                command += ["--dry-run"] if scale is DRY else []
                status, printed = run(command, min(scale.slack * STEPS[name][1], left))
                figures = json.loads(result.read_text()) if result.exists() else {}
        seconds = perf_counter() - before
        record["steps"][name] = {"status": status, "seconds": seconds, "figures": figures, "printed": printed[-LOG:]}
        print(f"{name}: {status}, {seconds:.0f} s", flush=True)
        keep(record)
    return record


def table(record: Mapping[str, Any]) -> str:
    """Markdown. Of a step that is not done, the last line that it printed."""
    lines = ["| step | figure | |", "| --- | --- | ---: |"]
    for name, step in record["steps"].items():
        last = "" if step["status"] == "done" else (step["printed"].strip().splitlines() or [""])[-1][:200]
        lines.append(f"| **{name}** | {step['status']}, {step['seconds']:.0f} s | {last.replace('|', '/')} |")
        for figure, value in step["figures"].items():
            lines.append(f"| | {figure} | {f'{value:.3g}' if isinstance(value, float) else value} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--step", choices=STEPS, help="run this step here, without a limit")
    arguments = parser.parse_args()
    scale = DRY if arguments.dry_run else FULL
    if scale is FULL and not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA device; --dry-run goes through the steps on a CPU\n")
    if arguments.step:
        with torch.no_grad():
            arguments.json.write_text(json.dumps(STEPS[arguments.step][0](scale)))
        return

    def keep(record: Figures) -> None:
        where = circumstances(scale.device) | {"device": describe(scale.device)}
        arguments.json.write_text(json.dumps(where | record, indent=1) + "\n")

    record = measure(arguments.only, arguments.minutes, scale, keep)
    print(f"\n{describe(scale.device)}\n\n{table(record)}")
    if any(step["status"] != "done" for step in record["steps"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
