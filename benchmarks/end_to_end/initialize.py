"""What an initialization costs compared with a bare forward pass over the same batches, and where the time goes.

    python benchmarks/end_to_end/initialize.py TEXT [--samples 64 ...] [--sequence-length 512] [--rounds 3]

The two alternate in one process: `quailora.build_adapter`, including reading the checkpoint and writing the adapter,
and the forward pass of the model's decoder, loaded beforehand by transformers, with bf16 products made in the same way
(half.py). Before timing, an adapter made from the first sequence is checked: computed in fp64 from the inputs of the
loaded model's last block, the output errors must be those in the report.

Shown are medians ± half the interquartile range. The floor of a stage is counted: for H (one triangle of each distinct
H) and the solve, their FLOPs at the speed of the bare forward pass; for loading, quantizing and writing, a copy of the
bytes. The last table breaks down the solve. On a GPU, H is accumulated beside the forward pass and its time is part of
it; and the solve is broken down in a run of its own, in which the host waits for each part.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quailora
from benchmarks.common.smollm2 import fetch
from benchmarks.common.timing import Timing, alternate, copy_rate, keep, require, wait
from benchmarks.kernels.solver import krylov_flops
from quailora import ops
from quailora.calibration.data import Calibration, CalibrationConfig, read_calibration
from quailora.calibration.gram import Gram
from quailora.evaluate import default_batch_size
from quailora.memory.budget import describe_bytes
from quailora.modeling.blocks import linear_weight
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import default_device
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.build import ALPHA, RANK
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.registry import config_for
from quailora.solvers import krylov
from quailora.solvers import solve as solvers
from quailora.solvers.registry import SOLVERS

STAGES = ("load", "forward", "H", "quantize", "solve", "write")


# What is timed within a stage. No part calls another.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "H": [(Gram, "update")],
    "orthonormalization": [(ops, "grouped_orthonormalize")],
    "initial objective": [(ops, "gram_energy")],
    "eigenproblems of Rayleigh and Ritz": [(krylov, "_find_ritz")],
    "products with E": [(ops, "grouped_error_product"), (ops, "grouped_error_product_t")],
    "products with H": [(ops, "grouped_gram_product")],
    "balancing": [(solvers, "_balance")],
    "making E": [(ops, "error")],
    "mirroring H": [(ops, "mirror_")],
}


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time spent in each of PARTS. On a GPU, the host waits before and after each."""

    def timing(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait()
            start = perf_counter()
            result = function(*args, **kwargs)
            wait()
            seconds[part] += perf_counter() - start
            return result

        return run

    with ExitStack() as stack:
        for part, functions in PARTS.items():
            seconds[part] = 0.0
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, timing(getattr(owner, name), part)))
        yield


def floors(checkpoint: Checkpoint, tokens: int, bare: float, rate: float) -> dict[str, float]:
    """The least each stage can take, in bare forward passes of `bare` seconds; the device copies `rate` bytes/s.

    A linear takes 2 m n FLOPs per token, a triangle of H n². Attention is left out.
    """
    stream = StreamedModel(checkpoint, torch.device("cpu"), checkpoint.dtype)
    linears = triangles = elements = factors = 0
    solves = 0.0
    depth = SOLVERS["krylov"].iterations or 0
    for block in stream.blocks:
        inputs = {}
        for name, linear in block.linears().items():
            m, n = linear_weight(linear).shape
            rank = min(RANK, m, n)
            linears += 2 * m * n * tokens
            solves += krylov_flops(m, n, rank, depth)
            elements += m * n
            factors += (m + n) * rank
            # q, k and v share an input, and so do gate and up. Told by name, for this count only.
            stem = name.rpartition(".")[2]
            inputs[
                "qkv" if stem in ("q_proj", "k_proj", "v_proj") else "mlp" if stem in ("gate_proj", "up_proj") else stem
            ] = n
        triangles += sum(n * n for n in inputs.values()) * tokens
    element = checkpoint.dtype.itemsize
    moved = {"load": 2 * element * elements, "quantize": (element + 0.5 + 4 / 64) * elements, "write": 2 * 4 * factors}
    found = {"forward": 1.0, "H": triangles / linears, "solve": solves / linears}
    return found | {stage: size / rate / bare for stage, size in moved.items()}


# Largest difference between reported output errors and those in fp64, relative to the error with A Bᵀ = 0. Two forward
# passes may round single inputs differently, in bf16 by up to 4e-3, but a root mean square of many by far less.
AGREEMENT = 1e-3


@torch.no_grad()
def check(checkpoint: Checkpoint, model: Any, config: LoraConfig, data: Calibration) -> None:
    """Initialize from the first sequence of `data`, and exit if the report is wrong about the last block.

    model: the checkpoint, loaded by transformers.
    """
    first = Calibration(data.sequences[:1], data.source)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "adapter"
        report = quailora.build_adapter(checkpoint, config, first, output, progress=False)
        tensors = load_file(output / "adapter_model.safetensors")
    block = report.layers[-1].name.rpartition(".")[0].rpartition(".")[0]
    layers = {model.get_submodule(row.name): row for row in report.layers if row.name.startswith(f"{block}.")}
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.update({layer: inputs[0].flatten(0, -2).double()}))
        for layer in layers
    ]
    with ops.half_products(model.device, [model.dtype]):
        model.base_model(first.sequences[0][None].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    form = BitsAndBytes.from_config(config_for("nf4", checkpoint.dtype))
    for layer, row in layers.items():
        weight = linear_weight(layer)
        a, b = (tensors[f"base_model.model.{row.name}.lora_{part}.weight"].to(weight.device).double() for part in "AB")
        error = weight.double() - form.quantize(weight).dequantize().double()
        for residual, reported in (
            (error, row.output_error),
            (error - config.lora_alpha / config.r * b @ a, row.output_error_after),
        ):
            found = float((seen[layer] @ residual.T).square().sum(dim=1).mean().sqrt())
            off = (found - reported) / row.output_error
            require(off, AGREEMENT, f"{row.name}: the output error, against the report's,")


@torch.no_grad()
def measure(
    checkpoint: Checkpoint, model: Any, config: LoraConfig, data: Calibration, rounds: int, budgets: Sequence[str]
) -> dict[str, Any]:
    """Seconds of every round, and floors: an entry of the record's `runs`.

    model: the checkpoint, loaded by transformers.
    """
    device = model.device
    batches = list(data.batches(default_batch_size(data)))
    stages: list[dict[str, float]] = []
    parts: list[dict[str, float]] = []
    apart = device.type == "cpu"  # whether the time of H can be measured separately

    def forward() -> None:
        with ops.half_products(device, [model.dtype]):
            for batch in batches:
                model.base_model(batch.input_ids.to(device), use_cache=False)

    def initialize(split: bool = apart) -> None:
        of_parts = dict.fromkeys(PARTS, 0.0)
        with tempfile.TemporaryDirectory() as folder, timed(of_parts) if split else nullcontext():
            report = quailora.build_adapter(checkpoint, config, data, Path(folder) / "adapter", progress=False)
        found = dict(report.stages)
        if split:
            found |= {"forward": found["forward"] - of_parts["H"], "H": of_parts.pop("H")}
            parts.append(of_parts | {"the rest": found["solve"] - sum(of_parts.values())})
        stages.append(found)

    plans: dict[str, str] = {}

    def within(budget: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = quailora.build_adapter(
                checkpoint, config, data, Path(folder) / "adapter", memory_budget=budget, progress=False
            )
        plans[budget] = ", ".join(f"{name} {describe_bytes(size)}" for name, size in report.memory.items())

    candidates: dict[str, Callable[[], object]] = {"forward": forward, "initialize": initialize}
    timings = alternate(candidates | {each: partial(within, each) for each in budgets}, rounds)
    stages, parts = stages[1:], parts[1:]  # the first run is not measured
    if not apart:
        initialize(split=True)
        del stages[-1]
    tokens = len(data.sequences) * data.longest
    return {
        "samples": len(data.sequences),
        "length": data.longest,
        "forward": timings["forward"].seconds,
        "initialize": timings["initialize"].seconds,
        "stages": stages,
        "parts_of_solve": parts,
        "budgets": {each: {"plan": plans[each], "seconds": timings[each].seconds} for each in budgets},
        "floors": floors(checkpoint, tokens, timings["forward"].median, copy_rate(device, 2**28)),
    }


# ---- Tables


def table(record: Mapping[str, Any]) -> str:
    """Time and floor of every stage in bare forward passes, as Markdown; two columns per run of the record."""
    runs = record["runs"]
    heads = [f"{run['samples']} × {run['length']} tokens | floor" for run in runs]
    lines = [f"| stage | {' | '.join(heads)} |", f"| --- |{' ---: | ---: |' * len(runs)}"]
    for stage in STAGES:
        cells = [f"{_share(run, stage)} | {run['floors'][stage]:.2f}" for run in runs]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    totals = [f"**{_ratio(run, run['initialize'])}** | {sum(run['floors'].values()):.2f}" for run in runs]
    lines.append(f"| **total** | {' | '.join(totals)} |")
    for budget in runs[0]["budgets"]:
        within = [f"{_ratio(run, run['budgets'][budget]['seconds'])} | " for run in runs]
        lines.append(f"| total, within {budget} | {' | '.join(within)} |")
    return "\n".join(lines)


def solve_table(record: Mapping[str, Any]) -> str:
    """Breakdown of the solve of the record's last run, as Markdown."""
    run = record["runs"][-1]
    whole = median(sum(parts.values()) for parts in run["parts_of_solve"])
    shares = {part: median(parts[part] for parts in run["parts_of_solve"]) / whole for part in run["parts_of_solve"][0]}
    lines = [f"| {part} | {100 * share:.0f} % |" for part, share in shares.items()]
    return "\n".join(["| part of the solve | share |", "| --- | ---: |", *lines])


def _share(run: Mapping[str, Any], stage: str) -> str:
    if stage not in run["stages"][0]:
        return "within forward"
    bare = median(run["forward"])
    return _shown(Timing(tuple(stages[stage] / bare for stages in run["stages"])))


def _ratio(run: Mapping[str, Any], seconds: Sequence[float]) -> str:
    return _shown(Timing(tuple(mine / its for mine, its in zip(seconds, run["forward"], strict=True))))


def _shown(ratio: Timing) -> str:
    return f"{ratio.median:.2f} ± {50 * ratio.spread:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="text file to calibrate on")
    parser.add_argument("--model", help="a checkpoint; without one, smollm2.py provides it")
    parser.add_argument("--samples", type=int, nargs="+", default=[64], help="as many sequences; a job for each")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-budget", nargs="*", default=[], help="also within each of these, such as 300MiB")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    arguments = parser.parse_args()

    checkpoint = Checkpoint(arguments.model or fetch())
    device = default_device(None)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=checkpoint.dtype, device_map=device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    jobs = [
        read_calibration(
            checkpoint, arguments.text, CalibrationConfig(samples=samples, sequence_length=arguments.sequence_length)
        )
        for samples in arguments.samples
    ]
    check(checkpoint, model, config, jobs[0])
    backend = quailora.backends(device)["gram_"].backend
    print(f"{checkpoint.name}, {checkpoint.dtype}, {device}, H by {backend}, {torch.get_num_threads()} threads\n")
    record: dict[str, Any] = {"dtype": str(checkpoint.dtype), "backend_of_H": backend, "runs": []}
    for data in jobs:
        run = measure(checkpoint, model, config, data, arguments.rounds, arguments.memory_budget)
        record["runs"].append(run)
        print(
            f"{run['samples']} x {run['length']} tokens: bare forward pass {Timing(tuple(run['forward']))}", flush=True
        )
        for budget, within in run["budgets"].items():
            print(f"Within {budget}: {within['plan']}")
    print(f"\n{table(record)}\n\n{solve_table(record)}")
    keep(arguments.json, device, record)


if __name__ == "__main__":
    main()
