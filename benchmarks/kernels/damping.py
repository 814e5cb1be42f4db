"""Choose the default damping on held-out text: perplexity of Q + A Bᵀ for several dampings and amounts of calibration
data.

    python benchmarks/kernels/damping.py TEXT [--model PATH]

The first tokens of TEXT are for calibration, later ones for evaluation. H is computed once per amount; the weights
Q + A Bᵀ are put into a dense model, which computes what the adapted base would.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM

import quailora
from benchmarks.common.layers import gather
from benchmarks.common.smollm2 import fetch
from quailora.calibration.data import Calibration, CalibrationConfig, read_calibration
from quailora.modeling.checkpoint import Checkpoint
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.registry import config_for

DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 8])
    parser.add_argument("--measure", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    checkpoint = Checkpoint(arguments.model or fetch())
    form = BitsAndBytes.from_config(config_for("nf4", checkpoint.dtype))
    most = max(arguments.samples)
    text = read_calibration(
        checkpoint,
        arguments.text,
        CalibrationConfig(most + arguments.measure, arguments.length),
    )
    held_out = Calibration(text.sequences[most:], f"the {arguments.measure} sequences after the first {most}")
    dense = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=checkpoint.dtype)
    rows = []
    for samples in arguments.samples:
        layers = gather(checkpoint, Calibration(text.sequences[:samples], text.source))
        for damping in DAMPINGS:
            for name, (weight, gram) in layers.items():
                q = form.quantize(weight)
                factors = quailora.solve(weight, q, gram, min(arguments.rank, *weight.shape), damping=damping)
                dense.get_parameter(f"{name}.weight").data = (q.dequantize().float() + factors.A @ factors.B.T).to(
                    weight.dtype
                )
            perplexity = quailora.evaluate.perplexity(dense, held_out.batches(2))
            rows.append({"samples": samples, "damping": damping, "perplexity": perplexity})
            print(f"{samples:4} x {arguments.length}   damping {damping:<7g} perplexity {perplexity:.3f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
