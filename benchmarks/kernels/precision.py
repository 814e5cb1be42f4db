"""How low the precision of the products with E and H may be: the effect of rounding their factors on the objective.

    python benchmarks/kernels/precision.py CALIBRATE [--model PATH] [--blocks N]

The first 64 x 512 tokens of CALIBRATE, a text file, are the calibration data. Every linear of the model, or of N blocks
spread over its depth, is solved with each pair of precisions, undamped; the objective is computed from the residual in
fp64.

A CUDA device uses the kernels themselves. On a CPU they are emulated: the factors of every product are rounded to the
precision and multiplied in fp32, and the systems of als are solved like in the kernel, in fp32 with one step of
refinement. Whatever else the CPU computes in fp64 stays in fp64.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import quailora
from benchmarks.common.layers import gather
from benchmarks.common.smollm2 import fetch
from quailora import ops
from quailora.calibration.data import CalibrationConfig, read_calibration
from quailora.calibration.gram import Gram
from quailora.modeling.checkpoint import Checkpoint
from quailora.ops import reference
from quailora.ops.dispatch import Service
from quailora.ops.precision import PRECISIONS
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.registry import config_for
from quailora.solvers.registry import SOLVERS

# Solver -> the precisions of E and of H, highest first; the others are compared with the first.
# svd ignores H.
PAIRS = {
    "krylov": [("ieee", "ieee"), *((e, "bf16x3") for e in PRECISIONS), ("tf32", "tf32")],
    "als": [("ieee", "ieee"), *((e, "bf16x3") for e in PRECISIONS), ("tf32", "tf32")],
    "svd": [(e, "") for e in PRECISIONS],
}

# "The cheapest that leaves the final objective within 0.01 %": no layer may lose more.
ALLOWED = 1e-4


def product(left: Tensor, right: Tensor, precision: str) -> Tensor:
    """Left @ right, fp32, as `kernels/precision.py` multiplies."""
    if precision == "bf16x3":
        high = right.bfloat16().float()
        low = (right - high).bfloat16().float()
        left_high = left.bfloat16().float()
        both = left_high + (left - left_high).bfloat16().float()
        return both @ high + left_high @ low
    return _rounded(left, precision) @ _rounded(right, precision)


def _rounded(x: Tensor, precision: str) -> Tensor:
    if precision == "bf16":
        return x.bfloat16().float()
    if precision == "tf32":  # tensor cores ignore the other bits
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert precision == "ieee", precision
    return x


@contextmanager
def emulated() -> Iterator[None]:
    """Within it operations on the CPU are as precise as the kernels, and solvers treat them as kernels."""

    def error_products(errors: Sequence[Any], rights: Sequence[Tensor], *, precision: str) -> list[Tensor]:
        return [product(e.float(), right, precision) for (e, _), right in zip(errors, rights, strict=True)]

    def error_products_t(errors: Sequence[Any], lefts: Sequence[Tensor], *, precision: str) -> list[Tensor]:
        return [product(e.float().T, left, precision) for (e, _), left in zip(errors, lefts, strict=True)]

    def gram_products(h: Tensor, rights: Sequence[Tensor], *, precision: str) -> list[Tensor]:
        return [product(h, right, precision) for right in rights]

    def cholesky_solve(systems: Tensor, right_hand_sides: Tensor) -> tuple[Tensor, Tensor]:
        c, y = systems.float(), right_hand_sides.float()
        x, info = reference.cholesky_solve(c, y)
        return (x + reference.cholesky_solve(c, y - c @ x)[0]).to(systems.dtype), info

    services = ops.backends("cpu") | {"grouped_error_product": Service("emulation", {})}
    with patch.multiple(
        ops,
        backends=lambda device=None: services,
        grouped_error_product=error_products,
        grouped_error_product_t=error_products_t,
        grouped_gram_product=gram_products,
        cholesky_solve=cholesky_solve,
    ):
        yield


def objectives(weight: Tensor, quantized: Tensor, gram: Tensor, rank: int) -> dict[tuple[str, str, str], float]:
    """(solver, precision of E, precision of H) -> the remaining objective of one linear; for svd, with H = I."""
    error, h = weight.double() - quantized.double(), gram.double()
    found = {}
    for solver, pairs in PAIRS.items():
        for of_e, of_h in pairs:
            gram_products = partial(_at, of_h or "ieee", ops.grouped_gram_product)
            with patch.object(ops, "grouped_gram_product", gram_products):
                factors = quailora.solve(weight, quantized, gram, rank, solver=solver, precision=of_e)
            residual = error - factors.A.double() @ factors.B.double().T
            energy = residual.square().sum() if solver == "svd" else ops.gram_energy(h, residual)
            found[solver, of_e, of_h] = float(energy) / 2
    return found


def _at(chosen: str, operation: Any, h: Tensor, rights: Sequence[Tensor], *, precision: str) -> Any:
    """H P in a precision that is not the solver's choice."""
    return operation(h, rights, precision=chosen)


def study(layers: Mapping[str, tuple[Tensor, Gram]], form: BitsAndBytes, rank: int) -> list[dict[str, Any]]:
    """The rows of the table, for all `layers` together."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for number, (name, (weight, gram)) in enumerate(layers.items(), 1):
        weight, h = weight.to(device), gram.matrix().to(device)
        found.append(objectives(weight, form.quantize(weight).dequantize(), h, min(rank, *weight.shape)))
        print(f"{number}/{len(layers)} {name}", flush=True)
    return summary(found)


def summary(found: Sequence[Mapping[tuple[str, str, str], float]]) -> list[dict[str, Any]]:
    """A row for each solver and pair of precisions: the increase of the objective over the highest precision."""
    rows = []
    for solver, pairs in PAIRS.items():
        for of_e, of_h in pairs:
            excess = [layer[solver, of_e, of_h] / layer[solver, *pairs[0]] - 1 for layer in found]
            rows.append(
                {
                    "solver": solver,
                    "E": of_e,
                    "H": of_h,
                    "mean": sum(excess) / len(excess),
                    "max": max(excess),
                    "above": sum(value > ALLOWED for value in excess),
                    "layers": len(excess),
                    "default": SOLVERS[solver].precision == of_e and of_h in ("bf16x3", ""),
                }
            )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown. The default of each solver is bold."""
    lines = ["| solver | E | H | mean | max | layers above 0.01 % |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        bold = "**" if row["default"] else ""
        cells = [row["solver"], row["E"], row["H"] or "none", _percent(row["mean"]), _percent(row["max"])]
        cells = [f"{bold}{cell}{bold}" for cell in [*cells, f"{row['above']} of {row['layers']}"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:+.4f} %" if abs(share) < 1e-2 else f"{100 * share:+.3g} %"


def spread(layers: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    """The layers of `count` blocks, evenly spaced from the first to the last; None: of all."""
    blocks = {name: int(number[1]) for name in layers if (number := re.search(r"\.(\d+)\.", name))}
    depth = max(blocks.values()) + 1
    count = min(count or depth, depth)
    chosen = {round(i * (depth - 1) / max(1, count - 1)) for i in range(count)}
    return {name: layers[name] for name, block in blocks.items() if block in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibrate", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    checkpoint = Checkpoint(arguments.model or fetch())
    form = BitsAndBytes.from_config(config_for("nf4", checkpoint.dtype))
    calibration = read_calibration(
        checkpoint, arguments.calibrate, CalibrationConfig(samples=arguments.samples, sequence_length=arguments.length)
    )
    layers = spread(gather(checkpoint, calibration), arguments.blocks)
    if torch.cuda.is_available():
        rows = study(layers, form, arguments.rank)
    else:
        with emulated():
            rows = study(layers, form, arguments.rank)
    how = "the kernels" if torch.cuda.is_available() else "emulated on a CPU"
    print(f"\n{len(layers)} layers, rank {arguments.rank}, {form.describe()}; {how}\n\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
