"""The solvers with every operation served by the kernels, interpreted."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from typing import Any

import pytest
import torch

from quailora import doctor
from quailora.doctor import examine
from quailora.kernels import error_products
from quailora.ops import dispatch, reference
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.gptq import GPTQ
from quailora.solvers import als
from quailora.solvers.config import SolverConfig
from quailora.solvers.error_matrix import ErrorMatrices, choose_form
from quailora.solvers.inputs import Linear
from quailora.solvers.solve import solve, solve_group
from tests.helpers import interpreter
from tests.helpers.rounding import assert_product

interpreter.install()

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for operation, candidates in dispatch._BACKENDS.items():
        free = [replace(b, obstacle=lambda device: None) if b.name == "triton" else b for b in candidates]
        monkeypatch.setitem(dispatch._BACKENDS, operation, tuple(free))
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def test_doctor_finds_nothing() -> None:
    findings = list(takewhile(lambda finding: finding.operation != "solve", examine(CPU, size=32)))
    assert [finding for finding in findings if not finding.sound] == []
    by_kernels = {finding.operation for finding in findings if finding.backend == "triton"}
    assert by_kernels == {name for name, candidates in dispatch._BACKENDS.items() if candidates[0].name == "triton"} - {
        "packed"
    }
    for product in ("grouped_error_product", "grouped_error_product_t"):
        kinds = {finding.case.partition(", ")[0] for finding in findings if finding.operation == product}
        assert kinds == {"NF4", "FP4", "LLM.int8", "int3", "3 linears", "E in bf16"}


def test_doctor_finds_nothing_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of which no two are alike, and E in the place of W: `tests/kernels/test_mutations.py` plants faults."""
    cases = [case for case in doctor._cases(32) if case.name.startswith(("3 linears", "E in bf16"))]
    assert len(cases) == 2 * 2 * 2
    monkeypatch.setattr(doctor, "_cases", lambda size: cases)
    assert [finding for finding in examine(CPU, size=32) if not finding.sound] == []


@pytest.mark.parametrize("solver", ["krylov", "als"])
def test_the_trace_ends_with_the_objective(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However coarse the products of the iteration are."""
    monkeypatch.setattr(als, "SVD_DEPTH", 1)
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 48, generator=g), torch.randn(40, 48, generator=g).mul(0.02).bfloat16()
    quantized = BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16).quantize(weight)
    found = solve(weight, quantized, x.T @ x, 16, solver=solver, iterations=1, precision="bf16")
    assert found.trace[-1] == pytest.approx(found.objective, rel=1e-9)  # the same sums


@pytest.mark.parametrize(
    ("solver", "steps", "overwrite"), [("krylov", 2, False), ("krylov", 20, True), ("als", 2, False), ("svd", 2, False)]
)
def test_kernels_reach_what_the_reference_reaches(
    solver: str, steps: int, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(als, "SVD_DEPTH", 1)  # interpreted, a solve takes seconds
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 48, generator=g) * torch.arange(1, 49) ** -0.5
    x[:, ::24] *= 100
    h, form = x.T @ x, BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16)
    weights = [torch.randn(m, 48, generator=g).mul(0.02).bfloat16() for m in (40, 17)]
    linears = [Linear(w, form.quantize(w), r) for w, r in zip(weights, (16, 5), strict=True)]
    copies = [replace(linear, weight=linear.weight.clone()) for linear in linears]
    by_kernels = solve_group(copies, h, SolverConfig(solver, steps, damping=1e-4), overwrite_weights=overwrite)
    monkeypatch.undo()
    monkeypatch.setattr(als, "SVD_DEPTH", 1)
    dispatch._choose.cache_clear()
    for linear, copy, found in zip(linears, copies, by_kernels, strict=True):
        expected = solve(linear.weight, linear.quantized, h, linear.rank, solver=solver, iterations=steps, damping=1e-4)
        # What the precision in use costs. Factors may differ by more: it is the objective that they are to agree on.
        if solver == "svd":  # which minimizes another
            assert found.trace[-1] == pytest.approx(expected.trace[-1], rel=1e-4)
        else:
            assert found.objective == pytest.approx(expected.objective, rel=1e-4, abs=1e-6 * expected.initial)
        assert found.initial == pytest.approx(expected.initial, rel=1e-6)
        # Which no solver but svd minimizes; als amplifies rounding in it by the condition of its systems, up to 1.3e-3.
        assert found.residual_norm == pytest.approx(expected.residual_norm, rel=3e-3 if solver == "als" else 1e-3)
        # With so many products E is worth its while in memory.
        assert torch.equal(copy.weight, linear.weight) == (steps < 20)


def test_codes_of_gptq_are_read_by_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those of other formats and groups, which take launches of their own, and an E that no kernel can read."""
    launched: list[tuple[int, int]] = []
    launch = error_products._launch

    def watched(errors: Any, *arguments: Any) -> Any:
        launched.append((len(errors), 0 if errors[0][1] is None else errors[0][1].blocksize))
        return launch(errors, *arguments)

    monkeypatch.setattr(error_products, "_launch", watched)
    nf4 = BitsAndBytes("nf4", blocksize=64, compute_dtype=torch.bfloat16)
    forms = [GPTQ(3, 32), GPTQ(2, 64, symmetric=False), GPTQ(4, 64), GPTQ(8, 64), nf4]
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(m, 64, generator=g).mul(0.02).bfloat16() for m in (40, 17, 9, 24, 20)]
    quantized = [form.quantize(weight) for form, weight in zip(forms, weights, strict=True)]
    held = [choose_form(*each, products=9, overwrite=False) for each in zip(weights, quantized, strict=True)]
    assert held == ["fused", "fused", "fused", "dense", "fused"]
    rights = [torch.randn(64, 4, generator=g) for _ in weights]
    products = ErrorMatrices(weights, quantized, held).times(rights)
    assert launched == [(1, 32), (2, 64), (1, 0), (1, 64)]
    for weight, q, right, found in zip(weights, quantized, rights, products, strict=True):
        assert_product(found, reference.error(weight, q), right, "ieee")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_weights_of_dtypes_that_kernels_do_not_read(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 48, generator=g), torch.randn(40, 48, generator=g).to(dtype)
    quantized = BitsAndBytes("nf4", blocksize=64, compute_dtype=torch.float32).quantize(weight.float())
    found = solve(weight, quantized, x.T @ x, 16, overwrite_weight=True)
    expected = solve(weight.float(), quantized.dequantize(), x.T @ x, 16)
    assert found.objective == pytest.approx(expected.objective, rel=1e-5)
