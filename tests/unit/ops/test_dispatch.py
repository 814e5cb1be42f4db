"""The reference operations against plain fp64 algebra, and the dispatch that serves them."""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quailora import ops
from quailora.ops import backends, cpu, dispatch, extension, reference, triton
from quailora.ops.dispatch import Backend
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.feedback import Curvature
from quailora.quantization.gptq import GPTQ
from quailora.solvers import error_matrix
from quailora.solvers.error_matrix import ErrorMatrices, choose_form

# What fp32 products of these sizes lose to rounding, relative to their largest value, in whatever order they sum.
FP32 = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_orthonormal(q: Tensor, rank: int) -> None:
    """`rank` columns are orthonormal, and the others zero."""
    new = q.double()[:, q.any(dim=0)]
    assert new.shape[1] == rank
    # Each entry is a sum of products of values rounded to fp32 (6e-8): 1e-6 leaves a factor of ten.
    torch.testing.assert_close(new.T @ new, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("features", [1, 7, 256, 300, 2200])  # below, at and above one panel of the triangle; 8 of 275
def test_gram_and_mirror_make_the_full_product(features: int) -> None:
    x, h = random(2, 5, features), random(features, features)
    expected = (h + h.T).tril() + x.reshape(-1, features).T @ x.reshape(-1, features)
    h = (h + h.T).tril() + torch.full_like(h, 9.0).triu(1)  # what stands above the diagonal must not matter
    ops.gram_(h, x)
    ops.mirror_(h)
    torch.testing.assert_close(h.tril(), expected.tril(), rtol=FP32, atol=FP32)
    assert torch.equal(h, h.T)


def test_gram_never_reads_masked_rows() -> None:
    x, keep = random(3, 4, 6), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
    kept = x[keep]
    x[~keep] = float("nan")
    h = torch.zeros(6, 6)
    ops.gram_(h, x, keep)
    torch.testing.assert_close(h.tril(), (kept.T @ kept).tril(), rtol=FP32, atol=FP32)


@pytest.mark.parametrize("features", [5, 256, 520, 2200])
def test_gram_energy_is_the_trace(features: int) -> None:
    x, rows = random(40, features), random(9, features, seed=1)
    h = x.T @ x
    expected = torch.trace(rows.double() @ h.double() @ rows.double().T)
    energy = ops.gram_energy(h, rows)
    assert energy.dtype == torch.float64
    torch.testing.assert_close(energy, expected, rtol=FP32, atol=0)


class Packed:
    """A quantized weight whose codes the fused kernels read."""

    exact_difference = False

    def __init__(self, values: Tensor) -> None:
        self.values, self.packed = values, self
        self.codes = torch.zeros(values.numel() // 2, dtype=torch.uint8)

    def dequantize(self) -> Tensor:
        return self.values


def test_error_takes_dense_and_packed_weights_in_any_dtype() -> None:
    weight = torch.full((2, 3), 1.25, dtype=torch.float16)
    for quantized in (Packed(torch.ones(2, 3, dtype=torch.bfloat16)), torch.ones(2, 3)):
        e = ops.error(weight, quantized)
        assert e.dtype == torch.float32
        assert torch.equal(e, torch.full((2, 3), 0.25))


def test_error_by_rows_and_in_place() -> None:
    weight, quantized = random(5, 6), Packed(random(5, 6, seed=1))
    expected = weight - quantized.values
    assert torch.equal(ops.error(weight, quantized, start=1, stop=3), expected[1:3])
    assert ops.error(weight, quantized, out=weight) is weight
    assert torch.equal(weight, expected)


def test_grouped_products() -> None:
    h, ranks = random(6, 6), (2, 3)
    rights = [random(6, r, seed=r) for r in ranks]
    for product, right in zip(ops.grouped_gram_product(h, rights), rights, strict=True):
        torch.testing.assert_close(product, h @ right)
    weights, packed = [random(4, 6), random(5, 6, seed=1)], Packed(random(5, 6, seed=2))
    errors = [(weights[0].half(), None), (weights[1], packed)]  # E itself, and W with its Q
    dense = [weights[0].half().float(), weights[1] - packed.values]
    for product, e, right in zip(ops.grouped_error_product(errors, rights), dense, rights, strict=True):
        torch.testing.assert_close(product, e @ right)
    lefts = [random(4, 2), random(5, 3)]
    for product, e, left in zip(ops.grouped_error_product_t(errors, lefts), dense, lefts, strict=True):
        torch.testing.assert_close(product, e.T @ left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("method", "cached", "loss"),
    [
        ("nf4", True, 0),
        ("nested", True, 1e-4),  # measured: 7e-5 in bf16
        ("fp4", False, 1),
        ("int8", False, 1),
        ("int3", False, 1),  # with errors fed back: measured 5e-4
    ],
)
def test_e_takes_the_place_of_w_only_where_it_fits(
    method: str, cached: bool, loss: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`loss`: how much of E may be lost by rounding it to the dtype of W, relative to its norm."""
    weight = 0.02 * random(256, 512) * random(256, 1, seed=1).exp()  # rows, and columns, of all sizes
    weight[:, ::128] *= 20
    weight = weight.to(dtype)
    if method == "int3":
        x = random(1024, 512, seed=2) * torch.arange(1, 513) ** -0.5
        quantized = GPTQ(3, 64, dtype=dtype).calibrated(weight, Curvature.of(x.T @ x, damping=0.1))
    elif method == "int8":
        quantized = BitsAndBytes("int8").quantize(weight)
    else:
        kind = "fp4" if method == "fp4" else "nf4"
        quantization = BitsAndBytes(kind, double=method == "nested", blocksize=64, compute_dtype=dtype)
        quantized = quantization.quantize(weight)
    error = reference.error(weight, quantized)
    lost = (error.to(dtype) - error).norm() / error.norm()
    assert lost <= loss and (cached or lost > 1e-4)
    kernels = defaultdict(lambda: dispatch.Service("triton", {}))
    monkeypatch.setattr(ops, "backends", lambda device: kernels)
    assert choose_form(weight, quantized, products=58, overwrite=True) == ("cached" if cached else "fused")


@pytest.mark.parametrize("kernels", [True, False])
def test_codes_of_gptq_are_read_by_kernels_only(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, however many products there are: W - Q is not exact in 16 bits where calibration chose Q."""
    services = defaultdict(lambda: dispatch.Service("triton" if kernels else "reference", {}))
    monkeypatch.setattr(ops, "backends", lambda device: services)
    weight = random(64, 128).bfloat16()
    low, high = GPTQ(3, 64, symmetric=False).quantize(weight), GPTQ(8, 64).quantize(weight)
    expected = ["fused", "dense"] if kernels else ["dense", "dense"]
    assert [choose_form(weight, q, products=58, overwrite=True) for q in (low, high)] == expected
    assert ("packed" in vars(low)) == kernels


@pytest.mark.parametrize("method", ["dense", "int8"])
def test_e_takes_the_place_of_an_fp32_w_whatever_q_is(method: str) -> None:
    weight = random(300, 64)
    base = GPTQ(8, 64).quantize(weight)
    quantized = base.dequantize() if method == "dense" else base
    expected, right = reference.error(weight, quantized), random(64, 3, seed=1)
    form = choose_form(weight, quantized, products=9, overwrite=True)
    assert form == "cached" and choose_form(weight, quantized, products=9, overwrite=False) == "dense"
    [found] = ErrorMatrices([weight], [quantized], [form]).times([right])
    assert torch.equal(found, expected @ right) and torch.equal(weight, expected)


@pytest.mark.parametrize("form", ["dense", "cached", "fused"])
def test_error_matrices_are_the_same_in_every_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_matrix, "_PANEL_ELEMENTS", 500 * 7)
    weights = [random(1100, 7), random(5, 7, seed=1)]  # more rows than a panel has, and fewer
    packed = [Packed(random(1100, 7, seed=2)), Packed(random(5, 7, seed=3))]
    dense = [weight - q.values for weight, q in zip(weights, packed, strict=True)]
    kept = [weight.clone() for weight in weights]
    matrices = ErrorMatrices(weights, packed, [form, form])
    assert matrices.shapes == [(1100, 7), (5, 7)]
    rights, lefts = [random(7, 2), random(7, 3)], [random(1100, 2), random(5, 3)]
    for product, e, right in zip(matrices.times(rights), dense, rights, strict=True):
        torch.testing.assert_close(product, e @ right)
    for product, e, left in zip(matrices.transposed_times(lefts), dense, lefts, strict=True):
        torch.testing.assert_close(product, e.T @ left)
    assert matrices.products == 4
    some = matrices.subset([1])
    torch.testing.assert_close(some.times(rights[1:]), [dense[1] @ rights[1]])
    assert (some.shapes, some.products, matrices.products) == ([(5, 7)], 1, 4)
    for i, e in enumerate(dense):
        assert torch.equal(matrices.dense(i), e)
        assert torch.equal(torch.cat([panel for _, panel in matrices.panels(i)]), e)
    overwritten = [not torch.equal(weight, before) for weight, before in zip(weights, kept, strict=True)]
    assert overwritten == [form == "cached"] * 2


def test_linears_of_other_kinds_are_not_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    def product(errors: list, rights: list, *, precision: str) -> list[Tensor]:
        launches.append((len(errors), precision))
        return plain(errors, rights, precision=precision)

    plain = ops.grouped_error_product
    monkeypatch.setattr(ops, "grouped_error_product", product)
    weights = [random(3, 4), random(3, 4).half(), random(2, 4)]
    matrices = ErrorMatrices(weights, [Packed(torch.zeros_like(weight)) for weight in weights], ["fused"] * 3, "tf32")
    rights = [random(4, 2, seed=seed) for seed in range(3)]
    for product_, weight, right in zip(matrices.times(rights), weights, rights, strict=True):
        torch.testing.assert_close(product_, weight.float() @ right)
    matrices.times(rights, "bf16x3")
    assert launches == [(2, "tf32"), (1, "tf32"), (2, "bf16x3"), (1, "bf16x3")]


def test_cholesky_solve_is_batched_and_flags_the_indefinite() -> None:
    roots = random(3, 4, 4).double()
    systems = roots @ roots.mT + torch.eye(4)
    systems[1] -= 100 * torch.eye(4)
    right = random(3, 4, 2, seed=1).double()
    solutions, info = ops.cholesky_solve(systems, right)
    assert info.tolist() == [0, 1, 0]
    torch.testing.assert_close((systems @ solutions)[[0, 2]], right[[0, 2]])


@pytest.fixture(params=[reference.orthonormalize, cpu.orthonormalize], ids=["reference", "cpu"])
def orthonormalize(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_orthonormalize_spans_what_is_new(orthonormalize: Any) -> None:
    basis = orthonormalize(random(50, 6))
    y = random(50, 5, seed=1)
    q = orthonormalize(y, basis)
    assert q.shape == (50, 5)
    assert_orthonormal(torch.cat([basis, q], dim=1), 11)
    both = torch.cat([basis, q], dim=1)
    torch.testing.assert_close(both @ (both.T @ y), y, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
def test_orthonormalize_stands_ill_conditioned_blocks(condition: float, orthonormalize: Any) -> None:
    """Plain CholeskyQR in fp32 breaks near 4e3."""
    left = torch.linalg.qr(random(80, 8).double())[0]
    right = torch.linalg.qr(random(8, 8, seed=1).double())[0]
    y = (left * torch.logspace(0, -torch.tensor(condition).log10().item(), 8) @ right.T).float()
    q = orthonormalize(y)
    assert_orthonormal(q, 8)


def test_orthonormalize_drops_what_has_no_length_left(orthonormalize: Any) -> None:
    basis = orthonormalize(random(40, 3))
    new = random(40, 2, seed=1)
    y = torch.cat([basis @ random(3, 2, seed=2), new, new @ random(2, 3, seed=3), torch.zeros(40, 1)], dim=1)
    q = orthonormalize(y, basis)
    assert q.shape == (40, 8)
    assert_orthonormal(torch.cat([basis, q], dim=1), 3 + 2)


def test_orthonormalize_keeps_small_columns_that_are_new(orthonormalize: Any) -> None:
    y = random(40, 3) * torch.tensor([1e10, 1.0, 1e-10])
    q = orthonormalize(y)
    assert_orthonormal(q, 3)


def test_orthonormalize_fills_the_space_and_no_more(orthonormalize: Any) -> None:
    basis = orthonormalize(random(10, 7))
    q = orthonormalize(random(10, 6, seed=1), basis)
    full = torch.cat([basis, q], dim=1)
    assert_orthonormal(full, 10)
    assert not orthonormalize(random(10, 2, seed=2), full).any()
    assert not orthonormalize(torch.zeros(10, 2)).any()


def test_a_group_is_orthonormalized_as_its_blocks_alone(orthonormalize: Any) -> None:
    grouped = {reference.orthonormalize: reference, cpu.orthonormalize: cpu}[orthonormalize].grouped_orthonormalize
    ys = [random(50, 5), random(40, 3, seed=1)]
    bases = [orthonormalize(random(50, 6, seed=2)), orthonormalize(random(40, 2, seed=3))]
    for found, y, basis in zip(grouped(ys, bases), ys, bases, strict=True):
        assert torch.equal(found, orthonormalize(y, basis))
    for found, y in zip(grouped(ys), ys, strict=True):
        assert torch.equal(found, orthonormalize(y))


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_reflections_leave_to_the_reference_what_is_nearly_dependent(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis, new = cpu.orthonormalize(random(60, 6)), random(60, 4, seed=1)
    asked = []
    decide = reference.orthonormalize
    monkeypatch.setattr(reference, "orthonormalize", lambda *each: asked.append(1) or decide(*each))
    # Long in the basis, which takes a second round; still far from rounding.
    q = cpu.orthonormalize(scale * (1e4 * basis @ random(6, 4, seed=2) + new), basis)
    assert not asked
    assert_orthonormal(torch.cat([basis, q], dim=1), 10)
    for dependent in (basis[:, :1] + basis[:, 1:2], new[:, :1] - new[:, 1:2], torch.zeros(60, 1)):
        q = cpu.orthonormalize(scale * torch.cat([new, dependent], dim=1), basis)
        assert_orthonormal(torch.cat([basis, q], dim=1), 10)
    assert len(asked) == 3


@contextmanager
def chosen_anew(*caches: Any) -> Iterator[None]:
    """Within it backends are chosen by what is patched, and afterwards by what is there."""
    for cached in (dispatch._choose, *caches):
        cached.cache_clear()
    try:
        yield
    finally:
        for cached in (dispatch._choose, *caches):
            cached.cache_clear()


def test_backends_name_the_one_that_serves_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    services = backends("cpu")
    compiled = {"gram_", "quantize_columns"}
    others = services.keys() - compiled - {"grouped_orthonormalize", "bf16_products", "fp16_products"}
    assert {services[name].backend for name in others} == {"reference"}
    expected = "reference" if extension.obstacle(torch.device("cpu")) else "extension"
    assert {services[name].backend for name in compiled} == {expected}
    assert "for CPUs only, not for cuda" in str(extension.columns_obstacle(torch.device("cuda")))
    assert services["grouped_orthonormalize"].backend == "lapack"
    assert "not for cpu" in services["grouped_orthonormalize"].others["triton"]
    assert "for CPUs only, not for cuda" in str(cpu.obstacle(torch.device("cuda")))
    calls = []
    fast = Backend("fast", lambda h, rights, precision: calls.append("fast"))
    absent = Backend("absent", lambda h, rights, precision: calls.append("absent"), lambda d: f"not built for {d}")
    candidates = (absent, fast, *dispatch._BACKENDS["grouped_gram_product"][-1:])
    monkeypatch.setitem(dispatch._BACKENDS, "grouped_gram_product", candidates)
    with chosen_anew():
        service = backends("cpu")["grouped_gram_product"]
        assert service.backend == "fast"
        assert service.others == {"absent": "not built for cpu", "reference": "fast is preferred"}
        ops.grouped_gram_product(torch.eye(2), [torch.eye(2)])
        assert calls == ["fast"]


@pytest.mark.parametrize(
    ("capability", "expected", "why"), [((8, 0), "triton", None), ((7, 5), "reference", "sm_80 or later.* sm_75")]
)
def test_gpus_older_than_ampere_take_the_plain_path(
    capability: tuple[int, int], expected: str, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton, "_launcher_obstacle", lambda: None)
    with chosen_anew():
        service = backends("cuda:0")["cholesky_solve"]
    assert service.backend == expected
    if why is not None:
        assert re.search(why, service.others["triton"])


@pytest.mark.parametrize(
    "failure", [RuntimeError("Failed to find C compiler."), subprocess.CalledProcessError(1, ["gcc", "-I", "Python.h"])]
)
def test_without_a_c_compiler_triton_cannot_launch_and_that_is_known_before_a_run(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("triton.runtime", reason="Triton is not installed")

    class Driver:
        @property
        def active(self) -> None:
            raise failure

    monkeypatch.setattr(runtime, "driver", Driver())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with chosen_anew(triton._launcher_obstacle):
        service = backends("cuda:0")["grouped_error_product"]
    assert service.backend == "reference"
    assert re.search("cannot launch kernels here; it needs a C compiler.*(gcc|Failed)", service.others["triton"])


@pytest.mark.parametrize(
    ("architecture", "expected", "why"),
    [
        ("gfx942:sramecc+:xnack-", "triton", None),
        ("gfx90a:sramecc+:xnack-", "reference", "compiled and tested for gfx942 only, and cuda:0 is gfx90a$"),
        ("gfx1100", "reference", "compiled and tested for gfx942 only, and cuda:0 is gfx1100$"),
    ],
)
def test_amd_gpus_that_nobody_compiled_for_take_the_plain_path(
    architecture: str, expected: str, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from quailora.kernels import settings

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(triton, "_launcher_obstacle", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=architecture), raising=False
    )
    with chosen_anew(settings.target_of):
        service = backends("cuda:0")["grouped_error_product"]
    assert service.backend == expected
    if why is not None:
        assert re.search(why, service.others["triton"])


def test_without_triton_the_reference_serves_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # what an import then raises is ImportError
    with chosen_anew():
        service = backends("cuda:0")["grouped_orthonormalize"]
    assert service.backend == "reference"
    assert "Triton cannot be imported" in service.others["triton"]
