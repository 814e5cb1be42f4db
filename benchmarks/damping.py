"""Choose the default damping on held-out text: perplexity of Q + A Bᵀ for several dampings and amounts of calibration
data.

    python benchmarks/damping.py TEXT [--model PATH]

The first tokens of TEXT calibrate, tokens after them measure. H is gathered once per amount; the weights Q + A Bᵀ stand
in a dense model, which computes what the adapted base would.
"""

import argparse
import json
from pathlib import Path

import torch
from smollm2 import fetch
from torch import Tensor
from transformers import AutoModelForCausalLM

import quailora
from quailora.activations import Calls, collect
from quailora.blocks import StreamedModel, linear_weight
from quailora.calibration import Calibration
from quailora.checkpoint import Checkpoint
from quailora.gram import Gram
from quailora.pipeline import default_quantization, read_calibration
from quailora.quantized import Quantization, quantize

DAMPINGS = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1)


def gather(checkpoint: Checkpoint, calibration: Calibration) -> dict[str, tuple[Tensor, Gram]]:
    """The full-precision weight and H of every linear of every block, all in memory: for small models."""
    model, found = StreamedModel(checkpoint, torch.device("cpu"), checkpoint.dtype), {}
    batches = list(calibration.batches(8))
    with torch.no_grad():
        with model.resident(*model.outside_blocks()):
            calls = Calls(model)
            states, per_batch = zip(*(calls.record(batch) for batch in batches), strict=True)
        states = list(states)
        for index, block in enumerate(model.blocks):
            linears = block.linears()
            with model.resident(f"{block.name}."):
                with collect(linears) as collector:
                    for number, batch in enumerate(batches):
                        with collector.batch(batch.keep):
                            states[number] = per_batch[number][index].run(block.module, states[number])
                found |= {name: (linear_weight(linears[name]).clone(), gram) for name, gram in collector.grams.items()}
    return found


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
    form = Quantization.from_config(default_quantization(checkpoint.dtype))
    most = max(arguments.samples)
    text = read_calibration(
        checkpoint, arguments.text, samples=most + arguments.measure, sequence_length=arguments.length
    )
    held_out = Calibration(text.sequences[most:], f"the {arguments.measure} sequences after the first {most}")
    dense = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=checkpoint.dtype)
    rows = []
    for samples in arguments.samples:
        layers = gather(checkpoint, Calibration(text.sequences[:samples], text.source))
        for damping in DAMPINGS:
            for name, (weight, gram) in layers.items():
                q = quantize(weight, form)
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
