"""What an initialisation costs beside a bare forward pass over the same batches, and where the time goes.

    python benchmarks/initialize.py TEXT [--samples 64] [--sequence-length 512] [--rounds 3] [--model PATH] [--solve]

The two alternate in one process: `quailora.build_adapter`, reading the checkpoint and writing the adapter included; and
the decoder of the model, loaded beforehand by transformers. The floor of the ratio is the forward pass with one
triangle of every distinct H added up at the same speed. Medians. On a GPU, where H is added up beside the forward pass,
its time is within that of the forward pass. `--solve` prints what the solve is made of, on CPUs.
"""

import argparse
import json
import platform
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
from smollm2 import fetch
from timing import alternate
from transformers import AutoModelForCausalLM

import quailora
from quailora import methods, ops, solvers
from quailora.blocks import StreamedModel, linear_weight
from quailora.budget import describe_bytes
from quailora.checkpoint import Checkpoint
from quailora.gram import Gram
from quailora.pipeline import ALPHA, RANK, default_batch_size, default_device, read_calibration

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


def floor(checkpoint: Checkpoint) -> float:
    """(FLOPs of the linears + FLOPs of one triangle of every distinct H) / FLOPs of the linears, attention left out.

    A linear makes 2 m n FLOPs a token, a triangle n².
    """
    stream = StreamedModel(checkpoint, torch.device("cpu"), checkpoint.dtype)
    linears = triangles = 0
    for block in stream.blocks:
        inputs = {}
        for name, linear in block.linears().items():
            m, n = linear_weight(linear).shape
            linears += 2 * m * n
            # q, k and v share an input, gate and up do: told by their names, for this count only.
            stem = name.rpartition(".")[2]
            inputs[
                "qkv" if stem in ("q_proj", "k_proj", "v_proj") else "mlp" if stem in ("gate_proj", "up_proj") else stem
            ] = n
        triangles += sum(n * n for n in inputs.values())
    return 1 + triangles / linears


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
    shares = {stage: median(run[stage] for run in stages[1:]) / bare for stage in STAGES}
    print(f"{checkpoint.name}, {checkpoint.dtype}, {arguments.samples} x {data.longest} tokens, {device}")
    print(f"H by {quailora.backends(device)['gram_'].backend}, {torch.get_num_threads()} threads\n")
    print("| stage | of the bare forward pass |\n| --- | ---: |")
    for stage, share in shares.items():
        print(f"| {stage} | {f'{share:.2f}' if apart or stage != 'H' else 'within forward'} |")
    print(f"| **total** | **{ratio:.2f}** (floor {floor(checkpoint):.2f}; bare forward pass {bare:.1f} s) |")
    for name, budget in zip(budgets, arguments.memory_budget, strict=True):
        print(f"| {name} | {timings[name].over(timings['forward']):.2f} ({plans[budget]}) |")
    if arguments.solve and apart:
        whole = median(run["solve"] for run in stages[1:])
        print("\n| part of the solve | share |\n| --- | ---: |")
        for part in parts[0]:
            print(f"| {part} | {100 * median(run[part] for run in parts[1:]) / whole:.0f} % |")
    if arguments.json:
        record = {
            "tokens": arguments.samples * data.longest,
            "forward_seconds": timings["forward"].seconds,
            "initialise_seconds": timings["initialise"].seconds,
            "budgets": {name: {"seconds": timings[name].seconds} for name in budgets},
            "ratio": ratio,
            "shares": shares if apart else {stage: share for stage, share in shares.items() if stage != "H"},
            "backend_of_H": quailora.backends(device)["gram_"].backend,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
