"""What each solver gives back of what quantization costs, on a real model, and how near it comes to the optimum.

    python benchmarks/end_to_end/quality.py CALIBRATE MEASURE [--model PATH]

CALIBRATE and MEASURE are text files; the first 64 x 512 tokens of one calibrate, the first 16 x 512 of the other
measure. Perplexities are those of the deployed model: base and adapter loaded the ordinary way, on a CPU or a GPU. The
adapter is also put where it does not belong, on the full-precision weights and on an FP4 base, to show what that costs.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quailora
from benchmarks.common.layers import gather
from benchmarks.common.smollm2 import fetch
from quailora.calibration.data import Calibration, CalibrationConfig, read_calibration
from quailora.modeling.checkpoint import Checkpoint
from quailora.pipeline.build import ALPHA
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.registry import config_for
from quailora.solvers.config import DEFAULT_DAMPING

SOLVERS = ("krylov", "als", "svd")


def perplexity(
    checkpoint: Checkpoint,
    text: Calibration,
    quantization: BitsAndBytesConfig | None = None,
    adapter: Path | None = None,
) -> float:
    """Of a model that transformers and PEFT load."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.name, dtype=checkpoint.dtype, quantization_config=quantization, device_map=device
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    found = quailora.evaluate.perplexity(model, text.batches(2))
    del model
    gc.collect()
    return found


def excess_over_optimum(checkpoint: Checkpoint, calibration: Calibration, rank: int) -> dict[str, float]:
    """Mean over all linears of (objective of a solver / objective of the closed form in fp64) - 1, undamped."""
    form = BitsAndBytes.from_config(config_for("nf4", checkpoint.dtype))
    excess: dict[str, list[float]] = {"krylov": [], "als": []}
    for weight, gram in gather(checkpoint, calibration).values():
        q, h = form.quantize(weight).dequantize(), gram.matrix()
        error = weight.double() - q.double()

        def left(factors: quailora.LoraFactors, error: torch.Tensor = error, h: torch.Tensor = h) -> float:
            residual = error - factors.A.double() @ factors.B.double().T
            return float(((residual @ h.double()) * residual).sum()) / 2

        best = left(quailora.solve(weight, q, h, rank, solver="eigh"))
        for solver, found in excess.items():
            found.append(left(quailora.solve(weight, q, h, rank, solver=solver)) / best - 1)
    return {solver: sum(found) / len(found) for solver, found in excess.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibrate", type=Path)
    parser.add_argument("measure", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--damping", type=float, default=DEFAULT_DAMPING)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    checkpoint = Checkpoint(arguments.model or fetch())
    calibration = read_calibration(checkpoint, arguments.calibrate, CalibrationConfig(samples=64, sequence_length=512))
    text = read_calibration(checkpoint, arguments.measure, CalibrationConfig(samples=16, sequence_length=512))
    nf4 = config_for("nf4", checkpoint.dtype)
    fp4 = BitsAndBytesConfig(**(nf4.to_diff_dict() | {"bnb_4bit_quant_type": "fp4", "load_in_4bit": True}))
    results: dict[str, float] = {}

    def show(name: str, value: float) -> None:
        results[name] = value
        print(f"{name:<46} {value:.4g}", flush=True)

    show("full precision", perplexity(checkpoint, text))
    show("NF4", perplexity(checkpoint, text, nf4))
    with tempfile.TemporaryDirectory() as folder:
        for solver in SOLVERS:
            config = LoraConfig(r=arguments.rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            output = Path(folder) / solver
            quailora.build_adapter(
                checkpoint, config, calibration, output, quantization=nf4, solver=solver, damping=arguments.damping
            )
            show(f"NF4 + {solver}", perplexity(checkpoint, text, nf4, output))
        krylov = Path(folder) / "krylov"
        show("krylov's adapter on the full-precision weights", perplexity(checkpoint, text, None, krylov))
        show("FP4", perplexity(checkpoint, text, fp4))
        show("krylov's adapter on an FP4 base", perplexity(checkpoint, text, fp4, krylov))
    closed = quailora.evaluate.gap_closed(results["full precision"], results["NF4"], results["NF4 + krylov"])
    if closed is not None:
        show("share of the initial gap closed by krylov", closed)
    for solver, value in excess_over_optimum(checkpoint, calibration, arguments.rank).items():
        show(f"{solver}: mean excess over the fp64 optimum", value)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
