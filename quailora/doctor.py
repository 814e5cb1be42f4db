"""The checks behind `quailora doctor`: every accelerated operation on a device against fp64 on the CPU.

The cases are small, because what matters is which code runs. One large case of each operation is timed, to compare its
speed with that of a copy on the device, which is the most that a memory-bound operation could reach.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from quailora import ops
from quailora.ops import cpu_matmul, reference
from quailora.ops.precision import PRECISIONS, exact_products
from quailora.quantization.registry import bases
from quailora.solvers.solve import solve

# The error a product may have against fp64, relative to its norm: ten times what its precision loses
# (kernels/precision.py), because sums vary in length. The reference always computes in fp32.
_ALLOWED = {"ieee": 2e-6, "bf16x3": 4e-5, "tf32": 7e-3, "bf16": 2e-2}

# Orthonormal up to rounding; solved as accurately as fp32 can at the condition numbers below.
_ORTHONORMAL, _SOLVED = 1e-5, 1e-3

# Two solvers that approach the same optimum may differ by this fraction of the objective.
_OBJECTIVE = 1e-3

# Of two scales that cost the same up to rounding either may be chosen, and then the rest of the row comes out
# differently; of all rows only a few have such.
_COLUMNS = 1e-2

_RUNS = 7

# Features of the timed cases: larger than the caches of a GPU, so that its memory sets the speed.
_LARGE = 4096


@dataclass(frozen=True)
class Finding:
    """The result of one case of an operation."""

    operation: str
    backend: str
    case: str
    error: float  # relative to the norm of the expected result; NaN if it raised
    allowed: float
    speed: float | None = None  # bytes of operands and results, counted once, per second; None if not timed
    raised: str | None = None  # the message of an exception

    @property
    def sound(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class _Case:
    operation: str
    name: str
    allowed: float
    operands: Sequence[Any]  # tensors and quantized weights, on the CPU
    run: Callable[..., Sequence[Tensor]]  # takes the operands on the device; packed, except for `solve`
    error: Callable[..., float]  # takes its results on the CPU
    timed: bool = False


def copy_speed(device: torch.device, size: int = 2**28) -> float:
    """Bytes read and written per second by a copy of `size` bytes on the device."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def examine(device: torch.device, *, size: int = 256, timed: bool = False) -> Iterator[Finding]:
    """Run each case of each operation, with about `size` features; if `timed`, also one large case of each."""
    for case in itertools.chain(_cases(size), _large_cases(_LARGE) if timed else ()):
        backend = ops.backends(device)[case.operation].backend if case.operation != "solve" else "all of them"
        speed = None
        try:
            with torch.no_grad(), exact_products(device):
                operands = [operand.to(device) for operand in case.operands]
                if case.operation != "solve":
                    operands = [each if isinstance(each, Tensor) else ops.packed(each.packed) for each in operands]
                results = case.run(*operands)
                error = case.error(*(result.cpu() for result in results))
                if case.timed:
                    touched = sum(each.nbytes for each in (*case.operands, *results))
                    speed = touched / _seconds(partial(case.run, *operands), device)
        except Exception as raised:  # a compiler, driver or launch may raise anything, and that is the finding
            message = " ".join(str(raised).split())[:300]
            yield Finding(case.operation, backend, case.name, math.nan, case.allowed, None, message)
        else:
            yield Finding(case.operation, backend, case.name, error, case.allowed, speed)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median over some runs, after one that may compile."""

    def once() -> float:
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    once()
    return median(once() for _ in range(_RUNS))


# Name -> dtype of W, and the base to quantize it by.
_EXAMPLES = {name: example for base in bases() for name, example in base.kernel_examples().items()}

# The precisions that the solvers use by default.
_DEFAULTS = ("bf16x3", "tf32")


def _cases(size: int) -> Iterator[_Case]:
    ragged = (size - 3, size + 5)  # not multiples of any tile
    for kind, (_, base) in _EXAMPLES.items():
        for shape, rank in (((size, 2 * size), 64), (ragged, 33)):
            if base.obstacle(*shape):
                shape = -(-shape[0] // 64) * 64, -(-shape[1] // 64) * 64
            yield from _error_cases(kind, shape, rank, PRECISIONS if kind == "NF4" else _DEFAULTS)
    # Like q, k and v: three layers in one launch, with different shapes and ranks.
    heights, ranks = (size, size - 3, 17), (64, 33, 5)
    group = [_Linear.quantized_as("NF4", m, 2 * size, r, seed=r) for m, r in zip(heights, ranks, strict=True)]
    yield from _product_cases(f"3 linears, NF4, {heights} x {2 * size}, r {ranks}", group, _DEFAULTS)
    cached = _Linear.quantized_as("NF4", size, 2 * size, 64).cached()
    yield from _product_cases(f"E in bf16, {size} x {2 * size}, r 64", [cached], _DEFAULTS)
    for n in (size, size + 5):
        h = _inputs(2 * n, n)
        h = h.T @ h
        for precision in PRECISIONS:
            yield _gram_product_case(h, precision)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield _gram_case(n, dtype)
    for dtype, name in cpu_matmul.NAMES.items():
        yield _half_case(size, dtype, name)
    for rank in (16, 33, 64, min(256, size)):
        yield _cholesky_case(rank, size)
        yield _orthonormalize_case(rank, 2 * size)
    for grid in ("symmetric", "asymmetric", "16 levels"):
        yield _columns_case(size + 5, min(128, size), grid)
    for solver, overwrite in (("krylov", False), ("als", True)):
        yield _solve_case(solver, overwrite, min(size, 512))  # its optimum takes an eigendecomposition on the CPU


def _large_cases(size: int) -> Iterator[_Case]:
    """One of each operation, as the default solver calls it."""
    x = _inputs(1024, size)
    cases = [
        *_error_cases("NF4", (size, 2 * size), 64, ["tf32"]),
        _gram_product_case(x.T @ x, "bf16x3"),
        _gram_case(size, torch.bfloat16, tokens=1024),
        _cholesky_case(64, size),
        _orthonormalize_case(64, 2 * size),
        _columns_case(size, 128, "symmetric"),
    ]
    for case in cases:
        yield replace(case, timed=True)


@dataclass(frozen=True)
class _Linear:
    """A layer to multiply by: W and its quantized weight, or E and None; E in fp64; the columns of the other factor."""

    weight: Tensor
    quantized: Any
    exact: Tensor
    rank: int

    @classmethod
    def quantized_as(cls, kind: str, m: int, n: int, rank: int, seed: int = 0) -> "_Linear":
        dtype, form = _EXAMPLES[kind]
        weight = _random(m, n, seed=seed).mul_(0.02).to(dtype)
        quantized = form.quantize(weight)
        return cls(weight, quantized, weight.double() - quantized.dequantize().double(), rank)

    def cached(self) -> "_Linear":
        """With E stored in the place of W."""
        error = self.exact.to(self.weight.dtype)
        return replace(self, weight=error, quantized=None, exact=error.double())


def _error_cases(kind: str, shape: tuple[int, int], rank: int, precisions: Sequence[str]) -> Iterator[_Case]:
    (m, n), name = shape, f"{kind}, {shape[0]} x {shape[1]}"
    linear = _Linear.quantized_as(kind, m, n, rank)
    yield _Case(
        "error",
        name,
        _ALLOWED["ieee"],
        [linear.weight, linear.quantized],
        lambda w, q: [ops.error(w, q)],
        lambda found: _distance(found, linear.exact),
    )
    yield from _product_cases(f"{name}, r {rank}", [linear], precisions)


def _product_cases(name: str, linears: Sequence[_Linear], precisions: Sequence[str]) -> Iterator[_Case]:
    """E P and Eᵀ A of layers that share their input, in one launch."""
    for operation, product, errors in (
        ("grouped_error_product", ops.grouped_error_product, [linear.exact for linear in linears]),
        ("grouped_error_product_t", ops.grouped_error_product_t, [linear.exact.T for linear in linears]),
    ):
        thins = [_random(e.shape[1], each.rank, seed=each.rank) for e, each in zip(errors, linears, strict=True)]
        expected = [e @ thin.double() for e, thin in zip(errors, thins, strict=True)]
        packed = [] if linears[0].quantized is None else [linear.quantized for linear in linears]
        for precision in precisions:
            yield _Case(
                operation,
                f"{name}, {precision}",
                _ALLOWED[precision],
                [*thins, *(linear.weight for linear in linears), *packed],
                partial(_products, product, precision, len(linears)),
                partial(_farthest, expected),
            )


def _products(product: Callable[..., list[Tensor]], precision: str, count: int, *operands: Any) -> list[Tensor]:
    thins, weights, packed = (operands[start : start + count] for start in (0, count, 2 * count))
    return product(list(zip(weights, packed or [None] * count, strict=True)), thins, precision=precision)


def _farthest(expected: Sequence[Tensor], *found: Tensor) -> float:
    return max(_distance(*each) for each in zip(found, expected, strict=True))


def _gram_product_case(h: Tensor, precision: str) -> _Case:
    n = len(h)
    right = _random(n, 64, seed=1)
    return _Case(
        "grouped_gram_product",
        f"{n} x {n}, r 64, {precision}",
        _ALLOWED[precision],
        [h, right],
        lambda h, right: ops.grouped_gram_product(h, [right], precision=precision),
        partial(_distance, expected=h.double() @ right.double()),
    )


def _gram_case(n: int, dtype: torch.dtype, tokens: int | None = None) -> _Case:
    x = _inputs(tokens or 2 * n, n).to(dtype)
    keep = torch.arange(len(x)) % 3 > 0
    expected = (x[keep].double().T @ x[keep].double()).tril()
    x[~keep] = math.nan  # masked tokens may hold anything

    def run(tokens: Tensor, keep: Tensor) -> list[Tensor]:
        h = torch.zeros(n, n, device=tokens.device)
        ops.gram_(h, tokens, keep)
        return [h]

    name = f"{n} features, {str(dtype).removeprefix('torch.')}, padding"
    return _Case("gram_", name, _ALLOWED["ieee"], [x, keep], run, lambda h: _distance(h.tril(), expected))


def _half_case(size: int, dtype: torch.dtype, name: str) -> _Case:
    left, right = _random(size, 2 * size).to(dtype), _random(2 * size, size, seed=1).to(dtype)

    def run(left: Tensor, right: Tensor) -> list[Tensor]:
        with ops.half_products(left.device, [dtype]):
            return [left @ right]

    distance = partial(_distance, expected=left.double() @ right.double())
    shape = f"{size} x {2 * size} x {size}"
    return _Case(f"{name}_products", shape, torch.finfo(dtype).eps, [left, right], run, distance)


def _cholesky_case(rank: int, width: int) -> _Case:
    roots, right = _random(3, 2 * rank, rank), _random(3, rank, width, seed=1)
    systems = roots.mT @ roots + 0.01 * torch.eye(rank)
    systems[1] -= 4 * rank * torch.eye(rank)  # not positive definite

    def error(solutions: Tensor, info: Tensor) -> float:
        if info[0] or info[2] or not info[1]:
            return math.inf
        return max(_distance(systems[i].double() @ solutions[i].double(), right[i].double()) for i in (0, 2))

    name = f"3 systems, r {rank}, {width} right-hand sides"
    return _Case("cholesky_solve", name, _SOLVED, [systems, right], ops.cholesky_solve, error)


def _orthonormalize_case(rank: int, rows: int) -> _Case:
    ys = [_random(rows, rank, seed=2), _random(rows + 5, rank, seed=3)]
    for y in ys:
        y[:, -1] = y[:, 0] - y[:, 1]  # linearly dependent

    def error(*qs: Tensor) -> float:
        return max(map(of_one, qs, ys))

    def of_one(q: Tensor, y: Tensor) -> float:
        q = q.double()[:, q.any(dim=0)]
        if q.shape[1] != rank - 1:
            return math.inf
        off = (q.T @ q - torch.eye(rank - 1, dtype=q.dtype)).abs().max().item()
        return max(off, _distance(q @ (q.T @ y.double()), y.double()))

    name = f"{rows} and {rows + 5} x {rank}, of rank {rank - 1}"
    run = lambda *ys: ops.grouped_orthonormalize(ys)  # noqa: E731
    return _Case("grouped_orthonormalize", name, _ORTHONORMAL, ys, run, error)


def _columns_case(rows: int, columns: int, grid: str) -> _Case:
    x, group = _inputs(2 * columns, columns), columns // 2
    lower = torch.linalg.cholesky((x.T @ x).double().flip(0, 1)).flip(0, 1)  # H = U D Uᵀ, U unit upper triangular
    factor, importance = (lower / lower.diagonal()).float().contiguous(), lower.diagonal().square().float()
    weight, feedback = _random(rows, columns).mul_(0.02), _random(rows, columns, seed=1).mul_(0.002)
    operands = [weight, feedback, factor, importance]
    options: dict[str, Any] = {"group": group, "bits": 4, "symmetric": grid == "symmetric", "clips": (1.0, 0.9, 0.8)}
    if grid == "16 levels":
        scales = weight.view(rows, -1, group).abs().amax(dim=2)
        operands += [scales, torch.linspace(-1, 1, 16).pow(3)]

    def run(operation: Callable[..., reference.Columns], *tensors: Tensor) -> reference.Columns:
        given = dict(zip(("scales", "levels"), tensors[4:], strict=False))
        return operation(*tensors[:4], **options, **given)

    def objective(errors: Tensor) -> float:
        return ((errors.double() @ factor.double() + feedback).square() @ importance.double()).sum().item()

    expected = objective(run(reference.quantize_columns, *operands).errors)

    def error(codes: Tensor, scales: Tensor, zeros: Tensor, errors: Tensor) -> float:
        each = codes.view(rows, -1, group)
        values = operands[5][each.int()] if grid == "16 levels" else each.float() - zeros[:, :, None].float()
        q = (scales[:, :, None] * values).view(rows, columns)
        return max(_distance(errors, (weight - q).double()), abs(objective(errors) / expected - 1))

    name = f"{rows} x {columns}, {grid}, groups of {group}"
    return _Case("quantize_columns", name, _COLUMNS, operands, partial(run, ops.quantize_columns), error)


def _solve_case(solver: str, overwrite: bool, size: int) -> _Case:
    x, (dtype, form) = _inputs(4 * size, size), _EXAMPLES["NF4"]
    h, weight = x.T @ x, _random(size, size).mul_(0.02).to(dtype)
    quantized = form.quantize(weight)
    error = weight.double() - quantized.dequantize().double()
    rank = min(32, size // 2)
    best = solve(weight, quantized, h, rank, solver="eigh").objective

    def run(weight: Tensor, quantized: Any, h: Tensor) -> list[Tensor]:
        steps = None if solver == "krylov" else 60  # enough to converge on any H
        factors = solve(weight.clone(), quantized, h, rank, solver=solver, iterations=steps, overwrite_weight=overwrite)
        return [factors.A, factors.B]

    def excess(a: Tensor, b: Tensor) -> float:
        left = reference.gram_energy(h, error - a.double() @ b.double().T).item() / 2
        return abs(left / best - 1)

    return _Case("solve", f"{solver}, NF4, {size} x {size}, r {rank}", _OBJECTIVE, [weight, quantized, h], run, excess)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; infinite if a value is not finite."""
    distance = ((actual.double() - expected).norm() / expected.norm()).item()
    return distance if math.isfinite(distance) else math.inf


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(tokens: int, features: int) -> Tensor:
    """Tokens (t, n) with a decaying spectrum and a few outlier channels, like the inputs of a layer."""
    x = _random(tokens, features) * torch.arange(1, features + 1) ** -0.5
    x[:, :: max(8, features // 4)] *= 10
    return x
