"""Time, memory and objective of a solve: the kernels compared with plain PyTorch, at the shapes of Llama 2.

    python benchmarks/kernels/solver.py [--shapes 7b ...] [--solver krylov ...] [--json PATH] [--compare OLD.json]

Linears that share an input are solved together, from NF4 with double quantization, in bf16. The candidates:

    fused          the kernels, on W and the codes: E is not in memory
    cached         the kernels, on E in bf16, made in W's memory
    torch fp32     plain PyTorch, on E in fp32
    torch bf16     plain PyTorch, on E in bf16, made in W's memory
    whole          `quailora.solve_group`, with its checks of the inputs and its statistics of the result

The first four take (W, codes, H) and return A and B. Their results are checked before anything is timed: on a small
shape against fp64, and on every shape against one another. Times are medians, ± half the range of the middle half of
the rounds. Next to each is the time that the device needs to copy the bytes counted for it by the formulas of
"Counted". Without a GPU, plain PyTorch is timed on small shapes, and a roofline is printed for GPUs.

--compare exits with 1 if something takes more than 1.2 times as long as in OLD.json from the same device. If there is
no such file yet, it says so.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quailora
from benchmarks.common.timing import alternate, copy_rate, describe, keep, require
from quailora import ops
from quailora.ops.precision import exact_products
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.protocol import QuantizedWeight
from quailora.solvers.config import SolverConfig
from quailora.solvers.error_matrix import ErrorMatrices, choose_form
from quailora.solvers.inputs import Linear
from quailora.solvers.problem import Problem
from quailora.solvers.registry import SOLVERS
from quailora.solvers.solve import solve_group

COMPARED = ("krylov", "als")
NF4 = BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16)


# ---- Shapes


@dataclass(frozen=True)
class Group:
    """Linears that share an input: `rows` are their m, `columns` their n."""

    name: str
    rows: tuple[int, ...]
    columns: int

    def ranks(self, rank: int) -> list[int]:
        """Of each linear: `rank`; for scaled-down sizes a quarter of its smaller side, so that some error is left."""
        return [min(rank, m // 4, self.columns // 4) for m in self.rows]


def groups(model: str, scale: int = 1) -> list[Group]:
    """The groups of a block of Llama 2, with its sizes divided by `scale`."""
    hidden, inner, keys = (size // scale for size in LLAMA_2[model])
    return [
        Group("q, k, v", (hidden, keys, keys), hidden),
        Group("o", (hidden,), hidden),
        Group("gate, up", (inner, inner), hidden),
        Group("down", (hidden,), inner),
    ]


LLAMA_2 = {"7b": (4096, 11008, 4096), "13b": (5120, 13824, 5120), "70b": (8192, 28672, 1024)}
SCALES = {"full": 1, "small": 8, "tiny": 64}


# ---- Counted: the bytes that must be read from or written to memory, and the FLOPs
#
# For the products with E and H and for computing E. Left out: small r-wide matrices, dequantizing, launches.

# Form of E -> bytes per element of a product, and of making E: W and the codes with their absmax read, E written.
PACKED = 2 + 0.5 + 4 / 64
PER_PRODUCT = {"fused": PACKED, "cached": 2.0, "dense": 4.0}
TO_MAKE = {"fused": 0.0, "cached": PACKED + 2, "dense": PACKED + 4}

# Precision -> the unit that multiplies, and the number of its products per product.
UNITS = {"ieee": ("fp32", 1), "bf16x3": ("bf16", 3), "tf32": ("tf32", 1), "bf16": ("bf16", 1)}

# Products with H for a number of iterations: see `quailora/solvers/`, which counts those with E itself.
GRAM_PRODUCTS: dict[str, Callable[[int], int]] = {"krylov": lambda depth: depth + 3, "als": lambda steps: steps + 1}
FINE = "bf16x3"  # of every product with H, and of krylov's last with E


@dataclass(frozen=True)
class Work:
    """The work of one step that runs alone: bytes, and FLOPs of one unit."""

    bytes: float
    flops: float = 0.0
    unit: str = "fp32"


def error_product(m: int, n: int, r: int, form: str, precision: str) -> Work:
    """E P or Eᵀ A: E, and the thin factor and the product in fp32, are moved once."""
    unit, times = UNITS[precision]
    return Work(PER_PRODUCT[form] * m * n + 4 * r * (m + n), times * 2 * m * n * r, unit)


def gram_product(n: int, k: int, precision: str, triangle: bool = True) -> Work:
    """H P for P (n, k): H, or one triangle of it, the thin factor and the product."""
    unit, times = UNITS[precision]
    return Work(4 * n * n / (2 if triangle else 1) + 8 * n * k, times * 2 * n * n * k, unit)


def initial_objective(group: Group) -> list[Work]:
    """1/2 tr(E H Eᵀ), with which `solve` starts, in fp32 and on one triangle; E is read as in a fused product."""
    n = group.columns
    return [Work(PACKED * m * n + 2 * n * n, m * n * n) for m in group.rows]


def solve_work(group: Group, solver: str, form: str, rank: int, triangle: bool = True) -> list[Work]:
    """All steps of a solve of a group, with the default iterations and precisions."""
    method, n = SOLVERS[solver], group.columns
    iterations = method.iterations or 0
    ranks = group.ranks(rank)
    work = [gram_product(n, sum(ranks), FINE, triangle)] * GRAM_PRODUCTS[solver](iterations)
    for m, r in zip(group.rows, ranks, strict=True):
        last = [error_product(m, n, r, form, FINE)]
        others = [error_product(m, n, r, form, method.precision)] * (method.products(iterations) - 1)
        work += [Work(TO_MAKE[form] * m * n), *others, *last]
    return work


def krylov_flops(m: int, n: int, r: int, depth: int, coarse: bool = False) -> float:
    """All FLOPs of `quailora.solve` by krylov for a linear, thin and small products included. fp64 counts twice.

    In blocks of r columns to the full depth, as on a GPU; on a CPU it may be done sooner.
    coarse: with the precise product at the end that kernels make. Dense decompositions as Golub and Van Loan count them
    (Matrix Computations, 4th edition): of k columns, an eigenproblem takes 9 k³.
    """
    k = r * (depth + 1)
    ends = 1 + coarse
    products = (2 * depth + 1 + ends) * error_product(m, n, r, "dense", "ieee").flops
    products += (depth + 1 + ends) * gram_product(n, r, "ieee").flops
    initial = m * n * n
    # Twice over: the basis taken out of each block but the first, then the block by its own Gram matrix.
    blocks = 2 * (4 * m * r * r * depth * (depth + 1) / 2 + (depth + 1) * (4 * m * r * r + 9 * r**3))
    restricted = 2 * n * k * k
    factors = 2 * (m if coarse else m + 2 * n) * k * r
    objectives = 2 * (m + 2 * n) * r * r
    balancing = 9 * r**3
    balanced = 2 * (m + n) * r * r
    return products + initial + restricted + factors + balanced + 2 * (blocks + 9 * k**3 + objectives + balancing)


@dataclass(frozen=True)
class Gpu:
    """Peaks from the data sheet: bytes per second, and FLOPs per second of each unit, without sparsity."""

    name: str
    bandwidth: float
    peaks: Mapping[str, float]

    def seconds(self, work: Sequence[Work]) -> float:
        """Time at the roofline: the steps run in sequence, each limited by its bytes or its FLOPs."""
        return sum(max(each.bytes / self.bandwidth, each.flops / self.peaks[each.unit]) for each in work)


# NVIDIA A100 Tensor Core GPU data sheet (80GB SXM), https://www.nvidia.com/en-us/data-center/a100/
# NVIDIA H100 Tensor Core GPU data sheet (SXM), https://www.nvidia.com/en-us/data-center/h100/
GPUS = (
    Gpu("A100", 2039e9, {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}),
    Gpu("H100", 3352e9, {"fp32": 67e12, "tf32": 494.7e12, "bf16": 989e12}),
)


def roofline(rank: int = 64, shapes: Sequence[str] = tuple(LLAMA_2), solvers: Sequence[str] = COMPARED) -> str:
    """Markdown: the least time a solve can take on the GPUs above, in ms, by the form of E."""
    forms = {"fused": "fused", "cached": "cached", "dense": "E fp32"}
    heads = [f"{gpu.name}: {name}" for gpu in GPUS for name in forms.values()]
    lines = [f"| solver | model | linears | {' | '.join(heads)} |", f"| --- | --- | --- |{' ---: |' * len(heads)}"]
    for solver in solvers:
        for model in shapes:
            for group in groups(model):
                cells = [solver, model, group.name]
                for gpu in GPUS:
                    times = [1e3 * gpu.seconds(solve_work(group, solver, form, rank)) for form in forms]
                    shown = [f"{time:.3g}" for time in times]
                    cells += [f"**{cell}**" if cell == shown[times.index(min(times))] else cell for cell in shown]
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| model | linears | {' | '.join(gpu.name for gpu in GPUS)} |"]
    lines.append(f"| --- | --- |{' ---: |' * len(GPUS)}")
    for model in shapes:
        for group in groups(model):
            times = [1e3 * gpu.seconds(initial_objective(group)) for gpu in GPUS]
            lines.append(f"| {model} | {group.name} | {' | '.join(f'{time:.3g}' for time in times)} |")
    return "\n".join(lines)


# ---- Plain PyTorch


class TorchErrors:
    """The E of a group, dense: fp32, or bf16 in W's memory. The interface is that of `ErrorMatrices`."""

    def __init__(
        self, weights: Sequence[Tensor], quantized: Sequence[QuantizedWeight], in_place: bool, tf32: bool
    ) -> None:
        pairs = [(weight, q.dequantize()) for weight, q in zip(weights, quantized, strict=True)]
        # In bf16 the difference is exact: W and Q are within a factor of two of each other, or Q is 0.
        self._errors = [weight.sub_(q) if in_place else weight.float() - q.float() for weight, q in pairs]
        self._tf32 = tf32
        self.device = weights[0].device

    def times(self, rights: Sequence[Tensor]) -> list[Tensor]:
        return [self._product(error, right) for error, right in zip(self._errors, rights, strict=True)]

    def transposed_times(self, lefts: Sequence[Tensor]) -> list[Tensor]:
        return [self._product(error.T, left) for error, left in zip(self._errors, lefts, strict=True)]

    def _product(self, error: Tensor, thin: Tensor) -> Tensor:
        if error.dtype == torch.float32:
            with _tf32(self._tf32):
                return error @ thin
        if not error.is_cuda:  # torch has no product of bf16 to fp32 for a CPU
            return error.float() @ thin
        # bf16 rounds the thin factor too much. Split in two bf16 parts it has 16 bits, and E is still read once.
        high = thin.bfloat16()
        halves = torch.cat([high, (thin - high.float()).bfloat16()], dim=1)
        both = torch.mm(error, halves, out_dtype=torch.float32)
        return both[:, : thin.shape[1]] + both[:, thin.shape[1] :]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


Factors = list[tuple[Tensor, Tensor]]


def torch_krylov(errors: TorchErrors, h: Tensor | None, shapes: Sequence[tuple[int, int, int]], depth: int) -> Factors:
    """Block Krylov with QR, after Musco and Musco: collect the blocks, orthonormalize all, then Rayleigh-Ritz.

    h: None for the identity. shapes: (m, n, r) of each linear. Products with E: 2 · depth + 2.
    """
    # The same starting block as `krylov`: before convergence, another one would give other factors.
    starts = [torch.randn(n, r, generator=torch.Generator().manual_seed(0)) for _, n, r in shapes]
    blocks = errors.times(_weigh(h, [torch.empty_like(start, device=errors.device).copy_(start) for start in starts]))
    blocks = [torch.linalg.qr(block).Q for block in blocks]
    bases = [[block] for block in blocks]
    for _ in range(depth):
        blocks = errors.times(_weigh(h, errors.transposed_times(blocks)))
        blocks = [torch.linalg.qr(block).Q for block in blocks]
        for basis, block in zip(bases, blocks, strict=True):
            basis.append(block)
    spans = [torch.linalg.qr(torch.cat(basis, dim=1)).Q for basis in bases]
    projected = errors.transposed_times(spans)
    found = []
    for span, p, weighed, (_, _, r) in zip(spans, projected, _weigh(h, projected), shapes, strict=True):
        restricted = p.double().T @ weighed.double()
        vectors = torch.linalg.eigh((restricted + restricted.T) / 2).eigenvectors[:, -r:].float()
        found.append((span @ vectors, p @ vectors))
    return found


def torch_als(errors: TorchErrors, h: Tensor, shapes: Sequence[tuple[int, int, int]], steps: int) -> Factors:
    """The paper's alternation, from block Krylov's approximation of E."""
    factors = torch_krylov(errors, None, shapes, SOLVERS["svd"].iterations or 0)
    rights = [right for _, right in factors]
    lefts = [left for left, _ in factors]
    for _ in range(steps):
        weighed = _weigh(h, rights)
        lefts = _divide(errors.times(weighed), rights, weighed)
        rights = _divide(errors.transposed_times(lefts), lefts, lefts)
    return list(zip(lefts, rights, strict=True))


def _weigh(h: Tensor | None, thins: Sequence[Tensor]) -> list[Tensor]:
    """H P for all of a group at once: H is read once."""
    if h is None:
        return list(thins)
    return list((h @ torch.cat(list(thins), dim=1)).split([thin.shape[1] for thin in thins], dim=1))


def _divide(numerators: Sequence[Tensor], thins: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """numerator (thinᵀ other)⁻¹, the small systems in fp64. cholesky_ex: unlike cholesky, the host does not wait."""
    quotients = []
    for numerator, thin, other in zip(numerators, thins, others, strict=True):
        system = thin.double().T @ other.double()
        factor = torch.linalg.cholesky_ex((system + system.T) / 2).L
        quotients.append(torch.cholesky_solve(numerator.double().T, factor).T.float())
    return quotients


# ---- Candidates


@dataclass(frozen=True, eq=False)
class Case:
    """A group to be solved. Some candidates overwrite W: `restore` restores it."""

    group: Group
    rank: int
    originals: list[Tensor]
    weights: list[Tensor]
    quantized: list[QuantizedWeight]
    gram: Tensor

    @classmethod
    def draw(cls, group: Group, rank: int, device: torch.device) -> "Case":
        """Inputs whose channels, and weights whose rows, fall off in scale. The same on every call.

        Without leading directions in E, the result of als, which begins with them, would depend on rounding.
        """
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def falling(count: int, exponent: float) -> Tensor:
            return torch.arange(1, count + 1, device=device) ** -exponent

        originals = [(falling(m, 0.5)[:, None] * normal(m, group.columns)).bfloat16() for m in group.rows]
        # So few tokens that a larger H is singular, as it is after calibration on little text.
        inputs = normal(min(4096, 4 * group.columns), group.columns) * falling(group.columns, 0.75)
        gram = inputs.T @ inputs
        weights = [original.clone() for original in originals]
        return cls(group, rank, originals, weights, [NF4.quantize(each) for each in originals], gram)

    @property
    def ranks(self) -> list[int]:
        return self.group.ranks(self.rank)

    def restore(self) -> None:
        for weight, original in zip(self.weights, self.originals, strict=True):
            weight.copy_(original)

    def objective(self, factors: Factors) -> float:
        """1/2 Σ tr(R H Rᵀ) over the group, from the residual itself, in fp32 with sums in fp64."""
        total = 0.0
        for weight, q, (a, b) in zip(self.originals, self.quantized, factors, strict=True):
            residual = weight.float() - q.dequantize().float() - a.float() @ b.float().T
            total += float(ops.gram_energy(self.gram, residual)) / 2
        return total


@dataclass(frozen=True)
class Candidate:
    """One way to solve a `Case`."""

    form: str | None  # of E; None: chosen by the plan
    triangle: bool  # whether it reads only one triangle of H
    errors: Callable[[Case, str], Any] | None  # for a solver; None: not available separately
    run: Callable[[Case, str], Factors]


def _kernel(form: str) -> Candidate:
    def errors(case: Case, solver: str) -> ErrorMatrices:
        return ErrorMatrices(case.weights, case.quantized, [form] * len(case.weights), SOLVERS[solver].precision)

    def run(case: Case, solver: str) -> Factors:
        method = SOLVERS[solver]
        count = len(case.weights)
        problem = Problem(
            errors=errors(case, solver),
            gram=case.gram,
            shift=0.0,
            initial=[1.0] * count,  # of the trace only, which is not asked for
            error_norm=[1.0] * count,
            ranks=case.ranks,
            iterations=method.iterations or 0,
            seed=0,
        )
        return [(solution.left, solution.right) for solution in method.run(problem)]

    return Candidate(form, True, errors, run)


def _torch(form: str) -> Candidate:
    def errors(case: Case, solver: str) -> TorchErrors:
        # In the lowest precision that ours may use: krylov tolerates TF32, als does not.
        return TorchErrors(case.weights, case.quantized, form == "cached", SOLVERS[solver].precision == "tf32")

    def run(case: Case, solver: str) -> Factors:
        shapes = [(*weight.shape, rank) for weight, rank in zip(case.weights, case.ranks, strict=True)]
        iterations = SOLVERS[solver].iterations or 0
        solve: Callable[..., Factors] = {"krylov": torch_krylov, "als": torch_als}[solver]
        return solve(errors(case, solver), case.gram, shapes, iterations)

    return Candidate(form, False, errors, run)


def _whole(case: Case, solver: str) -> Factors:
    linears = [Linear(*each) for each in zip(case.weights, case.quantized, case.ranks, strict=True)]
    config = SolverConfig(solver, damping=0.0)
    return [(found.A, found.B) for found in solve_group(linears, case.gram, config, overwrite_weights=True)]


CANDIDATES = {
    "fused": _kernel("fused"),
    "cached": _kernel("cached"),
    "torch fp32": _torch("dense"),
    "torch bf16": _torch("cached"),
    "whole": Candidate(None, True, None, _whole),
}


def available(device: torch.device) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The candidates that `device` can run, and why it cannot run the others."""
    service = quailora.backends(device)["grouped_error_product"]
    if service.backend == "triton":
        return CANDIDATES, {}
    missing = dict.fromkeys(("fused", "cached"), service.others["triton"])
    return {name: each for name, each in CANDIDATES.items() if name not in missing}, missing


# ---- Correct before fast

# Relative to the product's Frobenius norm: four times the error that `kernels/precision.py` gives for each.
TOLERANCES = {"ieee": 6e-7, "bf16x3": 1.6e-5, "tf32": 2.8e-3, "bf16": 9.2e-3}

# The candidates' objectives may differ by as much as a default precision may cost.
AGREEMENT = 1e-4

# Small, ragged, and wide enough that krylov's subspace is not the whole space.
SMALL = Group("small", (384, 320), 500)


def check(candidates: Mapping[str, Candidate], solver: str, rank: int, device: torch.device) -> None:
    """Check products and objectives of a small group against fp64. Ends the program if one is wrong."""
    case = Case.draw(SMALL, rank, device)
    pairs = zip(case.originals, case.quantized, strict=True)
    exact = [(weight.double() - q.dequantize().double()).cpu() for weight, q in pairs]
    h = case.gram.cpu()

    def left(factors: Factors) -> float:
        residuals = [error - a.double() @ b.double().T for error, (a, b) in zip(exact, factors, strict=True)]
        return sum(float(ops.gram_energy(h, residual)) / 2 for residual in residuals)

    linears = [Linear(e.float(), torch.zeros_like(e), r) for e, r in zip(exact, case.ranks, strict=True)]
    reference = left([(found.A, found.B) for found in solve_group(linears, h, SolverConfig(solver, damping=0.0))])
    for name, candidate in candidates.items():
        if candidate.errors is not None:
            case.restore()
            errors = candidate.errors(case, solver)
            for side, operation in enumerate((errors.transposed_times, errors.times)):
                thins = [torch.randn(e.shape[side], r) for e, r in zip(exact, case.ranks, strict=True)]
                products = operation([thin.to(device) for thin in thins])
                for product, error, thin in zip(products, exact, thins, strict=True):
                    true = (error if side else error.T) @ thin.double()
                    off = float((product.cpu() - true).norm() / true.norm())
                    require(off, TOLERANCES[SOLVERS[solver].precision], f"{name}: a product with E")
        case.restore()
        found = left([(a.cpu(), b.cpu()) for a, b in candidate.run(case, solver)])
        require(found / reference - 1, AGREEMENT, f"{name}: the objective of {solver}, against that on the host,")


# ---- Measured


def measure(
    case: Case, solver: str, candidates: Mapping[str, Candidate], rounds: int, rate: float
) -> list[dict[str, Any]]:
    """A row for each candidate, after checking their objectives."""
    left: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    for name, candidate in candidates.items():
        case.restore()
        factors, peaks[name] = _with_peak(partial(candidate.run, case, solver), case.gram.device)
        left[name] = case.objective(factors)
    least = min(left.values())
    for name, value in left.items():
        require(value / least - 1, AGREEMENT, f"{case.group.name}: the objective of {name}, against the least,")
    runs: dict[str, Callable[[], object]] = {}
    for name, candidate in candidates.items():
        runs |= {f"before {name}": case.restore, name: partial(candidate.run, case, solver)}
    timings = alternate(runs, rounds)
    rows = []
    for name, candidate in candidates.items():
        timing = timings[name]
        form = candidate.form or choose_form(
            case.weights[0], case.quantized[0], SOLVERS[solver].products(SOLVERS[solver].iterations or 0), True
        )
        work = solve_work(case.group, solver, form, case.rank, candidate.triangle)
        if name == "whole":
            work += initial_objective(case.group)
        counted = {"bytes": sum(each.bytes for each in work), "flops": sum(each.flops for each in work)}
        rows.append(
            {"solver": solver, "candidate": name, "objective": left[name], "peak_bytes": peaks[name]}
            | counted
            | {"floor": counted["bytes"] / rate, "seconds": timing.median, "spread": timing.spread}
        )
    return rows


def _with_peak(run: Callable[[], Factors], device: torch.device) -> tuple[Factors, int | None]:
    """What it returns, and its peak memory beyond what was allocated before; None if torch cannot say."""
    if device.type != "cuda":
        return run(), None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    found = run()
    return found, torch.cuda.max_memory_allocated(device) - before


# ---- Compared with an earlier run

SLOWER = 1.2  # ratio: more than a busy machine changes a median of alternating runs


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """Print the ratio of each row that both runs have. Returns rows that are too slow now; none on another device."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[part] for part in ("model", "linears", "solver", "candidate"))

    alike = all(new[part] == old[part] for part in ("device", "rank", "scale"))
    if not alike:
        print(
            f"\nOnly for what it is worth: the earlier run was on {old['device']}, rank {old['rank']}, {old['scale']}"
        )
    before = {key(row): row["seconds"] for row in old["rows"]}
    slower = []
    for row in new["rows"]:
        if key(row) in before:
            ratio = row["seconds"] / before[key(row)]
            print(f"{ratio:6.2f} x the time of before: {' '.join(key(row))}")
            if alike and ratio > SLOWER:
                slower.append(f"{' '.join(key(row))} takes {ratio:.2f} times as long as before")
    return slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=LLAMA_2, default=list(LLAMA_2))
    parser.add_argument("--solver", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--scale", choices=SCALES, help="full on a GPU, small on a CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compare", type=Path, metavar="OLD.json")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = arguments.scale or ("full" if device.type == "cuda" else "small")
    candidates, missing = available(device)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), exact_products(device):
        for solver in arguments.solver:
            check(candidates, solver, arguments.rank, device)
        rate = copy_rate(device, 2**30 if scale == "full" else 2**24)
        print(f"{describe(device)}, which copies {rate / 1e9:.0f} GB/s; rank {arguments.rank}, sizes: {scale}\n")
        print(
            f"{'model':5} {'linears':9} {'solver':7} {'candidate':11} {'ms':>9}   ± % {'floor ms':>9} {'MB':>7}"
            "  objective"
        )
        for model in arguments.shapes:
            for group in groups(model, SCALES[scale]):
                case = Case.draw(group, arguments.rank, device)
                for solver in arguments.solver:
                    for row in measure(case, solver, candidates, arguments.rounds, rate):
                        rows.append({"model": model, "linears": group.name, **row})
                        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
                        print(
                            f"{model:5} {group.name:9} {solver:7} {row['candidate']:11} {1e3 * row['seconds']:9.3f}"
                            f" {50 * row['spread']:5.0f} {1e3 * row['floor']:9.3f} {memory:>7}  {row['objective']:.6g}",
                            flush=True,
                        )
    for name, reason in missing.items():
        print(f"\nNot run: {name}. {reason}")
    if missing:
        counted = roofline(arguments.rank, arguments.shapes, arguments.solver)
        print(f"\nThe least ms that A100 and H100 can take, counted:\n\n{counted}")
    results = {
        "device": describe(device),
        "rank": arguments.rank,
        "scale": scale,
        "copy_rate": rate,
        "missing": missing,
        "rows": rows,
    }
    keep(arguments.json, device, results)
    if arguments.compare and not arguments.compare.exists():
        print(f"\nNothing to compare with: there is no {arguments.compare}")
    elif arguments.compare:
        slower = compare(results, json.loads(arguments.compare.read_text()))
        if slower:
            sys.exit("\n".join(slower))


if __name__ == "__main__":
    main()
