"""Every accelerated operation, as it is served on a device, against its specification: what `quailora doctor` prints.

An operation is compared with the same in fp64 on the CPU, and its speed with a copy on the device, which is the most
that any operation bound by memory could reach.
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

from quailora import ops, reference
from quailora.precision import PRECISIONS, exact_products
from quailora.quantized import Quantization, quantize
from quailora.solvers import solve

# How far from fp64 a product may be, relative to its norm: ten times what its precision loses (kernels/precision.py),
# for sums are shorter or longer. fp32 itself where the reference serves.
_ALLOWED = {"ieee": 2e-6, "bf16x3": 4e-5, "tf32": 7e-3, "bf16": 2e-2}

# Orthonormal to rounding, and solved to what fp32 gives at the conditions below.
_ORTHONORMAL, _SOLVED = 1e-5, 1e-3

# Two ways to the same optimum may stop this part of the objective apart.
_OBJECTIVE = 1e-3

_RUNS = 7


@dataclass(frozen=True)
class Finding:
    """What came of one case of an operation."""

    operation: str
    backend: str
    case: str
    error: float  # relative to the norm of what it should be; NaN if it raised
    allowed: float
    speed: float | None = None  # bytes of operands and results, each once, over seconds; None where not timed
    raised: str | None = None

    @property
    def sound(self) -> bool:
        return self.error <= self.allowed


@dataclass(frozen=True)
class _Case:
    operation: str
    name: str
    allowed: float
    operands: Sequence[Any]  # tensors and quantised weights, on the CPU
    run: Callable[..., Sequence[Tensor]]  # takes them as they are on the device; for all but `solve`, packed
    error: Callable[..., float]  # takes what it gave, on the CPU


def copy_speed(device: torch.device, size: int = 2**28) -> float:
    """Bytes per second, read and written, of a copy on the device of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def examine(device: torch.device, *, size: int = 256, timed: bool = False) -> Iterator[Finding]:
    """Each case of each operation, `size` features wide or a little off that."""
    for case in _cases(size):
        backend = ops.backends(device)[case.operation].backend if case.operation != "solve" else "all of them"
        speed = None
        try:
            with torch.no_grad(), exact_products(device):
                operands = [_moved(operand, device) for operand in case.operands]
                if case.operation != "solve":
                    operands = [each if isinstance(each, Tensor) else ops.packed(each) for each in operands]
                results = case.run(*operands)
                error = case.error(*(result.cpu() for result in results))
                if timed and case.operation != "solve":
                    touched = sum(each.nbytes for each in (*case.operands, *results))
                    speed = touched / _seconds(partial(case.run, *operands), device)
        except Exception as raised:  # whatever a compiler, a driver or a launch raises is what there is to find
            message = " ".join(str(raised).split())[:300]
            yield Finding(case.operation, backend, case.name, math.nan, case.allowed, None, message)
        else:
            yield Finding(case.operation, backend, case.name, error, case.allowed, speed)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs, after one that may compile."""

    def once() -> float:
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    once()
    return median(once() for _ in range(_RUNS))


_FORMS = {
    "NF4": (torch.bfloat16, Quantization("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16)),
    "FP4": (torch.float16, Quantization("fp4", double=False, blocksize=64, compute_dtype=torch.float16)),
    "NF4, fp32": (torch.float32, Quantization("nf4", double=False, blocksize=64, compute_dtype=torch.float32)),
    "LLM.int8": (torch.bfloat16, Quantization("int8")),
}


def _cases(size: int) -> Iterator[_Case]:
    ragged = (size - 3, size + 5)  # nothing divides these
    for kind in _FORMS:
        for shape, rank in (((size, 2 * size), 64), (ragged, 33)):
            yield from _error_cases(kind, shape, rank)
    for n in (size, size + 5):
        h = _inputs(2 * n, n)
        h = h.T @ h
        for precision in PRECISIONS:
            yield _gram_product_case(h, precision)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield _gram_case(n, dtype)
    for rank in (16, 33, 64, min(256, size)):
        yield _cholesky_case(rank, size)
        yield _orthonormalize_case(rank, 2 * size)
    for solver, overwrite in (("krylov", False), ("als", True)):
        yield _solve_case(solver, overwrite, min(size, 512))  # the optimum takes an eigen-decomposition on the CPU


def _error_cases(kind: str, shape: tuple[int, int], rank: int) -> Iterator[_Case]:
    (m, n), (dtype, form) = shape, _FORMS[kind]
    weight = _random(m, n).mul_(0.02).to(dtype)
    quantized = quantize(weight, form)
    exact = weight.double() - quantized.dequantize().double()
    name = f"{kind}, {m} x {n}"
    yield _Case(
        "error",
        name,
        _ALLOWED["ieee"],
        [weight, quantized],
        lambda w, q: [ops.error(w, q)],
        lambda found: _distance(found, exact),
    )
    right, left = _random(n, rank, seed=1), _random(m, rank, seed=2)
    products = {
        "grouped_error_product": (ops.grouped_error_product, right, exact @ right.double()),
        "grouped_error_product_t": (ops.grouped_error_product_t, left, exact.T @ left.double()),
    }
    for (operation, (product, thin, expected)), precision in itertools.product(products.items(), PRECISIONS):
        yield _Case(
            operation,
            f"{name}, r {rank}, {precision}",
            _ALLOWED[precision],
            [weight, quantized, thin],
            partial(_error_product, product, precision),
            partial(_distance, expected=expected),
        )


def _error_product(
    product: Callable[..., list[Tensor]], precision: str, w: Tensor, q: Any, thin: Tensor
) -> list[Tensor]:
    return product([(w, q)], [thin], precision=precision)


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


def _gram_case(n: int, dtype: torch.dtype) -> _Case:
    tokens, keep = _inputs(2 * n, n).to(dtype), torch.arange(2 * n) % 3 > 0
    expected = (tokens[keep].double().T @ tokens[keep].double()).tril()
    tokens[~keep] = math.nan  # padding may hold anything

    def run(tokens: Tensor, keep: Tensor) -> list[Tensor]:
        h = torch.zeros(n, n, device=tokens.device)
        ops.gram_(h, tokens, keep)
        return [h]

    name = f"{n} features, {str(dtype).removeprefix('torch.')}, padding"
    return _Case("gram_", name, _ALLOWED["ieee"], [tokens, keep], run, lambda h: _distance(h.tril(), expected))


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
    y = _random(rows, rank, seed=2)
    y[:, -1] = y[:, 0] - y[:, 1]  # adds nothing

    def error(q: Tensor) -> float:
        q = q.double()[:, q.any(dim=0)]
        if q.shape[1] != rank - 1:
            return math.inf
        off = (q.T @ q - torch.eye(rank - 1, dtype=q.dtype)).abs().max().item()
        return max(off, _distance(q @ (q.T @ y.double()), y.double()))

    name = f"{rows} x {rank}, of rank {rank - 1}"
    return _Case("orthonormalize", name, _ORTHONORMAL, [y], lambda y: [ops.orthonormalize(y)], error)


def _solve_case(solver: str, overwrite: bool, size: int) -> _Case:
    x, (dtype, form) = _inputs(4 * size, size), _FORMS["NF4"]
    h, weight = x.T @ x, _random(size, size).mul_(0.02).to(dtype)
    quantized = quantize(weight, form)
    error = weight.double() - quantized.dequantize().double()
    rank = min(32, size // 2)
    best = solve(weight, quantized, h, rank, solver="eigh").objective

    def run(weight: Tensor, quantized: Any, h: Tensor) -> list[Tensor]:
        steps = None if solver == "krylov" else 60  # far enough on any H
        factors = solve(weight.clone(), quantized, h, rank, solver=solver, iterations=steps, overwrite_weight=overwrite)
        return [factors.A, factors.B]

    def excess(a: Tensor, b: Tensor) -> float:
        left = reference.gram_energy(h, error - a.double() @ b.double().T).item() / 2
        return abs(left / best - 1)

    return _Case("solve", f"{solver}, NF4, {size} x {size}, r {rank}", _OBJECTIVE, [weight, quantized, h], run, excess)


def _moved(operand: Any, device: torch.device) -> Any:
    """A tensor on `device`, or a quantised weight with its tensors there."""
    if isinstance(operand, Tensor):
        return operand.to(device)
    parts = {
        name: _moved(part, device)
        for name, part in vars(operand).items()
        if isinstance(part, Tensor) or hasattr(part, "dequantize")
    }
    return replace(operand, **parts)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖; infinite where a value is not finite."""
    distance = ((actual.double() - expected).norm() / expected.norm()).item()
    return distance if math.isfinite(distance) else math.inf


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(tokens: int, features: int) -> Tensor:
    """Tokens (t, n) with a decaying spectrum and a few large channels, as a layer has."""
    x = _random(tokens, features) * torch.arange(1, features + 1) ** -0.5
    x[:, :: max(8, features // 4)] *= 10
    return x
