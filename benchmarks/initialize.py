"""What an initialisation costs beside a bare forward pass over the same batches, and where the time goes.

    python benchmarks/initialize.py TEXT [--samples 64] [--sequence-length 512] [--rounds 3] [--model PATH] [--solve]

The two alternate in one process: `quailora.build_adapter`, reading the checkpoint and writing the adapter included; and
the decoder of the model, loaded beforehand by transformers. Before that, an adapter made from the first sequence is
checked: with the inputs that the loaded model's last block has, in fp64, it must leave the output errors reported.

Shown are medians, ± half the range of the middle half of the rounds. The floor of a stage is what was counted of it:
the FLOPs of one triangle of every distinct H, and of the solve, at the speed of the bare forward pass; and of loading,
quantising and writing a copy of the bytes. On a GPU, where H is added up beside the forward pass, its time is within
that of the forward pass. `--solve` prints what the solve is made of, on CPUs.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
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
from smollm2 import fetch
from solver import krylov_flops
from timing import Timing, alternate, copy_rate, keep, require
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quailora
from quailora import methods, ops, solvers
from quailora.blocks import StreamedModel, linear_weight
from quailora.budget import describe_bytes
from quailora.calibration import Calibration
from quailora.checkpoint import Checkpoint
from quailora.gram import Gram
from quailora.pipeline import (
    ALPHA,
    RANK,
    default_batch_size,
    default_device,
    default_quantization,
    read_calibration,
)
from quailora.quantized import Quantization, quantize

STAGES = ("load", "forward", "H", "quantise", "solve", "write")


# What is timed within a stage: no part calls another.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "H": [(Gram, "update")],
    "orthonormalisation": [(ops, "orthonormalize")],
    "initial objective": [(ops, "gram_energy")],
    "eigenproblems of Rayleigh and Ritz": [(methods, "_ritz")],
    "products with E": [(ops, "grouped_error_product"), (ops, "grouped_error_product_t")],
    "products with H": [(ops, "grouped_gram_product")],
    "balancing": [(solvers, "_balance")],
    "making E": [(ops, "error")],
    "mirroring H": [(ops, "mirror_")],
}


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Within it, the time spent in each of PARTS is added up. On a GPU that would be the time to ask for it."""

    def timing(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            result = function(*args, **kwargs)
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
    """The least that each stage can take, in bare forward passes of `bare` seconds; the device copies `rate` bytes/s.

    A linear makes 2 m n FLOPs a token, a triangle n²; attention is left out.
    """
    stream = StreamedModel(checkpoint, torch.device("cpu"), checkpoint.dtype)
    linears = triangles = elements = factors = 0
    solves = 0.0
    depth = methods.METHODS["krylov"].iterations or 0
    for block in stream.blocks:
        inputs = {}
        for name, linear in block.linears().items():
            m, n = linear_weight(linear).shape
            rank = min(RANK, m, n)
            linears += 2 * m * n * tokens
            solves += krylov_flops(m, n, rank, depth)
            elements += m * n
            factors += (m + n) * rank
            # q, k and v share an input, gate and up do: told by their names, for this count only.
            stem = name.rpartition(".")[2]
            inputs[
                "qkv" if stem in ("q_proj", "k_proj", "v_proj") else "mlp" if stem in ("gate_proj", "up_proj") else stem
            ] = n
        triangles += sum(n * n for n in inputs.values()) * tokens
    element = checkpoint.dtype.itemsize
    moved = {"load": 2 * element * elements, "quantise": (element + 0.5 + 4 / 64) * elements, "write": 2 * 4 * factors}
    found = {"forward": 1.0, "H": triangles / linears, "solve": solves / linears}
    return found | {stage: size / rate / bare for stage, size in moved.items()}


# Between the output errors that a report gives and those of fp64, relative to that of A Bᵀ = 0. Two forward passes may
# round single inputs differently, in bf16 by up to 4e-3, but a root mean square of many by far less.
AGREEMENT = 1e-3


@torch.no_grad()
def check(checkpoint: Checkpoint, model: Any, config: LoraConfig, data: Calibration) -> None:
    """Initialise from the first sequence of `data`. Ends the program where the last block's report is not true.

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
    model.base_model(first.sequences[0][None].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    form = Quantization.from_config(default_quantization(checkpoint.dtype))
    for layer, row in layers.items():
        weight = linear_weight(layer)
        a, b = (tensors[f"base_model.model.{row.name}.lora_{part}.weight"].to(weight.device).double() for part in "AB")
        error = weight.double() - quantize(weight, form).dequantize().double()
        for residual, reported in (
            (error, row.output_error),
            (error - config.lora_alpha / config.r * b @ a, row.output_error_after),
        ):
            found = float((seen[layer] @ residual.T).square().sum(dim=1).mean().sqrt())
            off = (found - reported) / row.output_error
            require(off, AGREEMENT, f"{row.name}: the output error, against the report's,")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a file to take the calibration tokens from")
    parser.add_argument("--model", help="a checkpoint; without one, smollm2.py provides it")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--solve", action="store_true", help="print what the solve is made of")
    parser.add_argument("--memory-budget", nargs="*", default=[], help="also within each of these, such as 300MiB")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    arguments = parser.parse_args()

    checkpoint = Checkpoint(arguments.model or fetch())
    device = default_device(None)
    data = read_calibration(
        checkpoint, arguments.text, samples=arguments.samples, sequence_length=arguments.sequence_length
    )
    batches = list(data.batches(default_batch_size(data)))
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=checkpoint.dtype, device_map=device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    check(checkpoint, model, config, data)
    stages: list[dict[str, float]] = []
    parts: list[dict[str, float]] = []
    apart = device.type == "cpu"  # whether H takes time of its own

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model.base_model(batch.input_ids.to(device), use_cache=False)

    def initialise() -> None:
        of_parts = dict.fromkeys(PARTS, 0.0)
        with tempfile.TemporaryDirectory() as folder, timed(of_parts) if apart else nullcontext():
            report = quailora.build_adapter(checkpoint, config, data, Path(folder) / "adapter", progress=False)
        found = dict(report.stages)
        found["forward"] -= of_parts["H"]
        stages.append(found | {"H": of_parts.pop("H")})
        parts.append(of_parts | {"the rest": found["solve"] - sum(of_parts.values())})

    plans: dict[str, str] = {}

    def within(budget: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = quailora.build_adapter(
                checkpoint, config, data, Path(folder) / "adapter", memory_budget=budget, progress=False
            )
        plans[budget] = ", ".join(f"{name} {describe_bytes(size)}" for name, size in report.memory.items())

    budgets = {f"within {budget}": partial(within, budget) for budget in arguments.memory_budget}
    timings = alternate({"forward": forward, "initialise": initialise, **budgets}, rounds=arguments.rounds)
    bare = timings["forward"].median
    ratio = timings["initialise"].over(timings["forward"])
    # In bare forward passes; the first run is not measured.
    shares = {stage: Timing(tuple(run[stage] / bare for run in stages[1:])) for stage in STAGES}
    tokens = arguments.samples * data.longest
    least = floors(checkpoint, tokens, bare, copy_rate(device, 2**28))
    print(f"{checkpoint.name}, {checkpoint.dtype}, {arguments.samples} x {data.longest} tokens, {device}")
    print(f"H by {quailora.backends(device)['gram_'].backend}, {torch.get_num_threads()} threads\n")
    print("| stage | of the bare forward pass | ± | floor |\n| --- | ---: | ---: | ---: |")
    for stage, share in shares.items():
        shown = f"{share.median:.2f} | {50 * share.spread:.0f} %" if apart or stage != "H" else "within forward | "
        print(f"| {stage} | {shown} | {least[stage]:.2f} |")
    print(f"| **total** | **{ratio:.2f}** | {50 * timings['initialise'].spread:.0f} % | {sum(least.values()):.2f} |")
    for name, budget in zip(budgets, arguments.memory_budget, strict=True):
        print(
            f"| {name} ({plans[budget]}) | {timings[name].over(timings['forward']):.2f} "
            f"| {50 * timings[name].spread:.0f} % | |"
        )
    print(f"\nThe bare forward pass: {timings['forward']}")
    if arguments.solve and apart:
        whole = median(run["solve"] for run in stages[1:])
        print("\n| part of the solve | share |\n| --- | ---: |")
        for part in parts[0]:
            print(f"| {part} | {100 * median(run[part] for run in parts[1:]) / whole:.0f} % |")
    record = {
        "tokens": tokens,
        "forward_seconds": timings["forward"].seconds,
        "initialise_seconds": timings["initialise"].seconds,
        "budgets": {name: {"seconds": timings[name].seconds} for name in budgets},
        "ratio": ratio,
        "shares": {stage: share.median for stage, share in shares.items() if apart or stage != "H"},
        "floors": least,
        "backend_of_H": quailora.backends(device)["gram_"].backend,
    }
    keep(arguments.json, device, record)


if __name__ == "__main__":
    main()
