"""Perplexity before training, by bits and by how codes are chosen, each without and with the factors.

    python benchmarks/end_to_end/low_bits.py CALIBRATE MEASURE [--model PATH] [--bits 4 3 2] [--damping 0.1 ...]

CALIBRATE and MEASURE are text files; the first 64 x 512 tokens of one calibrate, the first 16 x 512 of the other
measure. W and H are gathered once, and every base is made from them, as `quailora init --bits` makes it. Perplexities
are those of a dense model with Q, and with Q + A Bᵀ, in place of W. "left" is the geometric mean over the linears of
the objective with the factors, relative to that of A Bᵀ = 0 and Q = 0. Alternations count from 0: the factors are
found once, which with MagR is CLoQ (arXiv 2501.18475). The time of a row, quantizing and solving, is given in forward
passes over the calibration tokens. --json is written after each row, and other rows that it has already stay.
"""

import argparse
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import quailora
from benchmarks.common import tables
from benchmarks.common.layers import gather
from benchmarks.common.smollm2 import fetch
from benchmarks.common.timing import keep
from quailora import ops
from quailora.calibration.data import Calibration, CalibrationConfig, read_calibration
from quailora.calibration.gram import Gram
from quailora.evaluate import default_batch_size
from quailora.modeling.checkpoint import Checkpoint
from quailora.pipeline.quantize import CalibratedQ, GivenQ, Initialized
from quailora.pipeline.stages import Stages
from quailora.quantization.gptq import GPTQ
from quailora.quantization.protocol import QuantizedBase
from quailora.quantization.registry import config_for, from_config
from quailora.quantization.rounding import DEFAULT_ALTERNATIONS, DEFAULT_DAMPING, RoundingConfig
from quailora.quantization.verify import CALIBRATED, NEAREST
from quailora.solvers.config import SolverConfig

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One way to make a base."""

    base: QuantizedBase
    rounding: RoundingConfig

    @property
    def name(self) -> str:
        name = self.base.name
        if isinstance(self.base, GPTQ) and not self.base.symmetric:
            name += " asymmetric"
        if self.rounding.rounding == NEAREST:
            return f"{name} nearest"
        magr = f", MagR {self.rounding.magr:g}" if self.rounding.magr else ""
        chosen = f"λ {self.rounding.damping:g}, alternations {self.rounding.alternations}{magr}"
        return f"{name} calibrated, {chosen}"

    def make(self, layers: Mapping[str, tuple[Tensor, Gram]], rank: int, stages: Stages) -> dict[str, Initialized]:
        """Q and the factors of every linear; those that share an H together, as in a run."""
        solver = SolverConfig()
        by_weights = GivenQ(lambda name, weight: self.base.quantize(weight), solver, stages)
        step = (
            by_weights if self.rounding.rounding == NEAREST else CalibratedQ(self.base, self.rounding, solver, stages)
        )
        found: dict[str, Initialized] = {}
        for _, group in itertools.groupby(layers.items(), key=lambda item: id(item[1][1])):
            members = dict(group)
            gram = next(iter(members.values()))[1]
            weights = {name: weight for name, (weight, _) in members.items()}
            found |= step(weights, dict.fromkeys(weights, rank), gram, overwrite=False)
        return found


def forward_seconds(model: Any, calibration: Calibration) -> float:
    """Of one forward pass of the decoder over all calibration tokens, after a batch that is not timed."""
    batches = list(calibration.batches(default_batch_size(calibration)))
    with torch.no_grad(), ops.half_products(model.device, [model.dtype]):
        for batch in batches[:1]:
            model.base_model(batch.input_ids, use_cache=False)
        start = perf_counter()
        for batch in batches:
            model.base_model(batch.input_ids, use_cache=False)
        return perf_counter() - start


def perplexity(model: Any, weights: Mapping[str, Tensor], text: Calibration) -> float:
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.to(model.dtype)
    return quailora.evaluate.perplexity(model, text.batches(2))


def table(record: Mapping[str, Any]) -> str:
    """Of what --json has written, for docs/guides/bases.md; the rows of a base stand together."""
    bases = ("NF4", "int8", "int4", "int3", "int2")
    rows = [
        (name, f"{row['alone']:.1f}", f"{row['with factors']:.2f}", f"{100 * row['left']:.2f} %")
        for name, row in sorted(record["rows"].items(), key=lambda item: bases.index(item[0].split()[0]))
    ]
    heads = ("base", "alone", "with factors", "left of ½ tr(W H Wᵀ)")
    return f"Full precision: {record['full precision']:.2f}.\n\n{tables.table(heads, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibrate", type=Path)
    parser.add_argument("measure", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--damping", type=float, nargs="*", default=[DEFAULT_DAMPING])
    parser.add_argument("--alternations", type=int, nargs="*", default=[0, DEFAULT_ALTERNATIONS])
    parser.add_argument("--magr", type=float, nargs="*", default=[0.0], help="strengths of MagR; 0 is without")
    parser.add_argument("--nf4", action="store_true", help="NF4 with double quantization too")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    checkpoint = Checkpoint(arguments.model or fetch())
    calibration = read_calibration(checkpoint, arguments.calibrate, CalibrationConfig(samples=64, sequence_length=512))
    text = read_calibration(checkpoint, arguments.measure, CalibrationConfig(samples=16, sequence_length=512))
    layers = gather(checkpoint, calibration)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=checkpoint.dtype)
    known = tables.read_json(arguments.json) if arguments.json else None
    results: dict[str, dict[str, float]] = known["rows"] if known else {}
    full = quailora.evaluate.perplexity(model, text.batches(2))
    forward = forward_seconds(model, calibration)
    print(f"{'full precision':<44} {full:8.2f}   forward pass {forward:.1f} s", flush=True)

    bases: list[QuantizedBase] = [
        GPTQ(bits, arguments.group_size, not arguments.asymmetric, checkpoint.dtype) for bits in arguments.bits
    ]
    if arguments.nf4:
        bases.insert(0, from_config(config_for("nf4", checkpoint.dtype)))
    for base in bases:
        roundings = [RoundingConfig(NEAREST)] + [
            RoundingConfig(CALIBRATED, damping, alternations, magr)
            for damping in arguments.damping
            for alternations in arguments.alternations
            for magr in arguments.magr
        ]
        for rounding in roundings:
            row, stages, start = Row(base, rounding), Stages(), perf_counter()
            found = row.make(layers, arguments.rank, stages)
            seconds = perf_counter() - start
            alone = {name: each.quantized.dequantize() for name, each in found.items()}
            adapted, left = {}, 0.0
            for name, each in found.items():
                assert each.factors is not None
                adapted[name] = alone[name].float() + each.factors.A @ each.factors.B.T
                weight, gram = layers[name]
                left += math.log(2 * each.factors.objective / float(ops.gram_energy(gram.matrix(), weight.float())))
            results[row.name] = {
                "alone": perplexity(model, alone, text),
                "with factors": perplexity(model, adapted, text),
                "left": math.exp(left / len(found)),
                "seconds": seconds,
                **stages.seconds,
            }
            of_row = results[row.name]
            print(
                f"{row.name:<44} {of_row['alone']:8.2f} {of_row['with factors']:8.2f}   left {of_row['left']:.5f}   "
                f"{seconds:.0f} s, {seconds / forward:.2f} forward passes "
                f"({', '.join(f'{name} {value:.0f}' for name, value in stages.seconds.items())})",
                flush=True,
            )
            keep(arguments.json, CPU, {"full precision": full, "forward seconds": forward, "rows": results})


if __name__ == "__main__":
    main()
