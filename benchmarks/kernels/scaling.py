"""How the cost grows with size: exponents of measured times, next to those of the counted FLOPs.

    python benchmarks/kernels/scaling.py [--scale small|large|tiny] [--json PATH]

Each sweep varies one size and keeps the others at the middle of their range. The sweeps are: H (`Gram.update`, in
bf16) over tokens t and features n; a krylov solve of one linear (m, n) from NF4 with double quantization over m, n and
the rank r; calibrated rounding of one linear to 3 bits over m and n; and `build_adapter` on Llamas of random weights
over blocks and tokens. "large" varies n alone, as it is in models of 7 to 8 billion parameters, and has no whole job.

Results are first compared with fp64. All sizes of a sweep run in turn; shown are medians, ± half the range of the
middle half of the rounds. The exponent is the slope of log time on log size, by least squares. The expected one is the
same slope of the FLOPs at the same sizes, lower-order terms included:

    H                t n (n + 1)
    solve            m n² for the initial objective, 2 m n r for each product with E, 2 n² r for each with H, and for
                     what is thin and small, in fp64, which counts twice, as `solver.krylov_flops` says
    rounding         n³ / 3 for the Cholesky factor of H, m n² to feed back errors
    build_adapter    2 t m n for the forward pass through each linear, 2 t l d for causal attention over l tokens of d
                     features, an H for each of a block's four inputs, a solve for each linear

An exponent below the expected one means that small sizes have overhead that does not grow, such as launches and Python;
one above it, that large sizes run at a lower rate, for example because they exceed the caches. The floor is these
FLOPs at the rate of torch's own product of two square matrices, in bf16 or fp32, whichever is faster.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import quailora
from benchmarks.common.timing import Timing, alternate, describe, keep, product_rate, require
from benchmarks.end_to_end.initialize import check
from benchmarks.kernels.gram import TOLERANCE, error
from benchmarks.kernels.solver import Case, Group, krylov_flops
from quailora.calibration.data import Calibration
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import default_device
from quailora.pipeline.build import ALPHA
from quailora.quantization.feedback import Curvature, Rounded, round_with_feedback
from quailora.solvers.registry import SOLVERS


@dataclass(frozen=True)
class Scale:
    """The sizes of every sweep, and the number of rounds of each."""

    square: int  # side of the matrices whose product is the floor's
    rounds: int
    tokens: tuple[int, ...]  # of H
    features: tuple[int, ...]
    rows: tuple[int, ...]  # of a linear
    columns: tuple[int, ...]
    ranks: tuple[int, ...]
    job_rounds: int = 0
    hidden: int = 0  # of the Llamas
    inner: int = 0
    length: int = 0  # of each sequence
    blocks: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()


SCALES = {
    "small": Scale(
        square=2048,
        rounds=9,
        tokens=(512, 1024, 2048, 4096, 8192),
        features=(256, 512, 1024, 2048),
        rows=(256, 512, 1024, 2048),
        columns=(256, 512, 1024, 2048),
        ranks=(8, 16, 32, 64),
        job_rounds=3,
        hidden=512,
        inner=1536,
        length=128,
        blocks=(1, 2, 4, 8),
        samples=(8, 16, 32, 64),
    ),
    "large": Scale(
        square=4096,
        rounds=3,
        tokens=(2048,),
        features=(4096, 11008, 14336),
        rows=(2048,),
        columns=(4096, 11008, 14336),
        ranks=(64,),
    ),
    "tiny": Scale(
        square=128,
        rounds=2,
        tokens=(64, 128),
        features=(64, 128),
        rows=(64, 128),
        columns=(64, 128),
        ranks=(4, 8),
        job_rounds=2,
        hidden=64,
        inner=128,
        length=16,
        blocks=(1, 2),
        samples=(2, 4),
    ),
}


def middle(sizes: Sequence[int]) -> int:
    return sizes[len(sizes) // 2]


@dataclass(frozen=True)
class Sweep:
    """One computation at several sizes. The results of `runs` have been checked."""

    what: str
    over: str
    runs: Mapping[int, Callable[[], object]]
    flops: Mapping[int, float]
    rounds: int


def swept(
    cases: Mapping[tuple[str, str], Mapping[int, tuple[int, ...]]],
    run: Callable[..., Callable[[], object]],
    flops: Callable[..., float],
    rounds: int,
) -> Iterator[Sweep]:
    """Of the cases with several sizes, each of which has a shape. `run` and `flops` take a shape."""
    for (what, over), shapes in cases.items():
        if len(shapes) > 1:
            runs = {size: run(*shape) for size, shape in shapes.items()}
            yield Sweep(what, over, runs, {size: flops(*shape) for size, shape in shapes.items()}, rounds)


# ---- H


def gram_flops(t: int, n: int) -> float:
    return t * n * (n + 1)


def gram_sweeps(scale: Scale, device: torch.device) -> Iterator[Sweep]:
    t, n = middle(scale.tokens), middle(scale.features)
    cases = {
        (f"H, n = {n}", "t"): {size: (size, n) for size in scale.tokens},
        (f"H, t = {t}", "n"): {size: (t, size) for size in scale.features},
    }
    return swept(cases, partial(_gram_update, device), gram_flops, scale.rounds)


def _gram_update(device: torch.device, t: int, n: int) -> Callable[[], object]:
    x = torch.randn(t, n, device=device).bfloat16()
    gram = quailora.Gram(n, device)
    gram.update(x)
    require(error(gram.matrix(), x), TOLERANCE, f"H of {t} tokens and {n} features")
    return partial(gram.update, x)


# ---- A solve

# Allowed relative difference of krylov's objective from the optimum, and from the objective it reports.
AGREEMENT = 1e-3


def solve_sweeps(scale: Scale, device: torch.device) -> Iterator[Sweep]:
    depth = SOLVERS["krylov"].iterations or 0
    coarse = quailora.backends(device)["grouped_error_product"].backend != "reference"
    m, n, r = middle(scale.rows), middle(scale.columns), middle(scale.ranks)
    cases = {
        (f"solve, n = {n}, r = {r}", "m"): {size: (size, n, r) for size in scale.rows},
        (f"solve, m = {m}, r = {r}", "n"): {size: (m, size, r) for size in scale.columns},
        (f"solve, m = {m}, n = {n}", "r"): {size: (m, n, size) for size in scale.ranks},
    }
    return swept(cases, partial(_solve, device), partial(krylov_flops, depth=depth, coarse=coarse), scale.rounds)


def _solve(device: torch.device, m: int, n: int, r: int) -> Callable[[], object]:
    case = Case.draw(Group("one", (m,), n), r, device)
    solve = partial(quailora.solve, case.originals[0], case.quantized[0], case.gram, r)
    found, best = solve(), solve(solver="eigh").objective
    error = case.originals[0].double() - case.quantized[0].dequantize().double()
    residual = error - found.A.double() @ found.B.double().T
    left = float(((residual @ case.gram.double()) * residual).sum()) / 2
    require(found.objective / left - 1, AGREEMENT, f"the objective that a solve of {(m, n, r)} states")
    require(left / best - 1, AGREEMENT, f"the objective of a solve of {(m, n, r)}, against the least,")
    return solve


# ---- Calibrated rounding

BITS, GROUP, DAMPING = 3, 32, 0.1


def rounding_flops(m: int, n: int) -> float:
    return n**3 / 3 + m * n * n


def rounding_sweeps(scale: Scale, device: torch.device) -> Iterator[Sweep]:
    m, n = middle(scale.rows), middle(scale.columns)
    cases = {
        (f"rounding, n = {n}", "m"): {size: (size, n) for size in scale.rows},
        (f"rounding, m = {m}", "n"): {size: (m, size) for size in scale.columns},
    }
    return swept(cases, partial(_round, device), rounding_flops, scale.rounds)


def _round(device: torch.device, m: int, n: int) -> Callable[[], object]:
    case = Case.draw(Group("one", (m,), n), 1, device)
    weight = case.originals[0]

    def run(feedback: bool = True) -> Rounded:
        curvature = Curvature.of(case.gram, DAMPING)
        curvature = curvature if feedback else curvature.without_feedback()
        return round_with_feedback(weight, curvature, bits=BITS, symmetric=True, group=GROUP)

    def damped(errors: Tensor) -> float:
        shift = DAMPING * case.gram.diagonal().mean()
        return float((errors @ case.gram * errors).sum() + shift * errors.square().sum())

    found = run()
    levels = found.codes.float() - found.zeros.float().repeat_interleave(GROUP, dim=1)
    q = levels * found.scales.repeat_interleave(GROUP, dim=1)
    require(float((weight.float() - found.errors - q).norm() / q.norm()), AGREEMENT, f"Q of {(m, n)} from its codes")
    require(
        damped(found.errors) / damped(run(feedback=False).errors),
        1.0,
        f"the error of {(m, n)}, against nearest rounding's,",
    )
    return run


# ---- The whole job

VOCABULARY = 512


def adapter_flops(scale: Scale, rank: int, blocks: int, tokens: int, coarse: bool = False) -> float:
    d, inner, depth = scale.hidden, scale.inner, SOLVERS["krylov"].iterations or 0
    linears = [(d, d)] * 4 + [(inner, d)] * 2 + [(d, inner)]
    forward = sum(2 * tokens * m * n for m, n in linears) + 2 * tokens * scale.length * d
    grams = 3 * gram_flops(tokens, d) + gram_flops(tokens, inner)
    return blocks * (forward + grams + sum(krylov_flops(m, n, rank, depth, coarse) for m, n in linears))


def adapter_sweeps(scale: Scale, device: torch.device, folder: Path) -> Iterator[Sweep]:
    coarse = quailora.backends(device)["grouped_error_product"].backend != "reference"
    blocks, samples, rank = middle(scale.blocks), middle(scale.samples), middle(scale.ranks)
    models = {depth: write_model(folder / f"model-{depth}", scale, depth) for depth in scale.blocks}
    outputs = (folder / f"adapter-{number}" for number in count())
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")

    def build(depth: int, data: Calibration) -> None:
        quailora.build_adapter(models[depth], config, data, next(outputs), progress=False)

    for model in models.values():
        loaded = AutoModelForCausalLM.from_pretrained(model, device_map=device)
        check(Checkpoint(model), loaded, config, random_tokens(scale, 1))
    whole = f"build_adapter, d = {scale.hidden}, r = {rank}"
    cases = {
        (f"{whole}, t = {samples * scale.length}", "blocks"): {size: (size, samples) for size in scale.blocks},
        (f"{whole}, {blocks} blocks", "t"): {size * scale.length: (blocks, size) for size in scale.samples},
    }

    def prepared(depth: int, n: int) -> Callable[[], object]:
        return partial(build, depth, random_tokens(scale, n))

    def flops(depth: int, n: int) -> float:
        return adapter_flops(scale, rank, depth, n * scale.length, coarse)

    yield from swept(cases, prepared, flops, scale.job_rounds)


def write_model(folder: Path, scale: Scale, blocks: int) -> Path:
    """A Llama with random weights in fp32, so that its forward pass, H and the solve run at similar rates."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=scale.hidden,
        intermediate_size=scale.inner,
        num_hidden_layers=blocks,
        num_attention_heads=scale.hidden // 32,
        vocab_size=VOCABULARY,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def random_tokens(scale: Scale, samples: int) -> Calibration:
    tokens = torch.randint(0, VOCABULARY, (samples, scale.length), generator=torch.Generator().manual_seed(0))
    return Calibration(tuple(tokens), "random tokens")


# ---- Exponents


def exponent(values: Mapping[int, float]) -> float:
    """The slope of log value on log size, by least squares."""
    return linear_regression([math.log(size) for size in values], [math.log(each) for each in values.values()]).slope


def figures(sweep: Sweep, rate: float) -> dict[str, Any]:
    """A sweep's result: times of every round by size, and the counted FLOPs."""
    timings = alternate({str(size): run for size, run in sweep.runs.items()}, sweep.rounds)
    return {
        "what": sweep.what,
        "over": sweep.over,
        "sizes": list(sweep.runs),
        "seconds": [timing.seconds for timing in timings.values()],
        "flops": list(sweep.flops.values()),
        "floors": [each / rate for each in sweep.flops.values()],
        "exponent": exponent({size: timings[str(size)].median for size in sweep.runs}),
        "expected": exponent(sweep.flops),
    }


HEAD = """\
| what | over | sizes | times | floors, ms | exponent | expected |
| --- | --- | --- | --- | --- | ---: | ---: |"""


def table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    return "\n".join([HEAD, *map(line, record["rows"])])


def line(row: Mapping[str, Any]) -> str:
    """A row of the Markdown table under HEAD."""
    times, floors = (
        (Timing(tuple(seconds)) for seconds in row["seconds"]),
        (f"{1e3 * floor:.3g}" for floor in row["floors"]),
    )
    cells = [row["what"], row["over"], *(", ".join(map(str, each)) for each in (row["sizes"], times, floors))]
    return f"| {' | '.join([*cells, *(f'{row[name]:.2f}' for name in ('exponent', 'expected'))])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()

    scale, device = SCALES[arguments.scale], default_device(None)
    rate = product_rate(device, scale.square)
    print(f"{describe(device)}, whose products make {rate / 1e9:.0f} GFLOP/s; sizes: {arguments.scale}\n")
    print(HEAD)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for sweep in chain(
            gram_sweeps(scale, device),
            solve_sweeps(scale, device),
            rounding_sweeps(scale, device),
            adapter_sweeps(scale, device, Path(folder)) if scale.blocks else (),
        ):
            rows.append(figures(sweep, rate))
            print(line(rows[-1]), flush=True)
            keep(arguments.json, device, {"scale": arguments.scale, "product_rate": rate, "rows": rows})


if __name__ == "__main__":
    main()
