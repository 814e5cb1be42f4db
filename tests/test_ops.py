"""The reference operations against plain fp64 algebra, and the dispatch that serves them."""

import pytest
import torch
from torch import Tensor

from quailora import ops
from quailora.ops import Backend, ErrorMatrix, backends

# What fp32 products of these sizes lose to rounding, relative to their largest value, in whatever order they sum.
FP32 = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_orthonormal(q: Tensor) -> None:
    gram = q.double().T @ q.double()
    # Each entry is a sum of products of values rounded to fp32 (6e-8): 1e-6 leaves a factor of ten.
    torch.testing.assert_close(gram, torch.eye(q.shape[1], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("features", [1, 7, 256, 300])  # below, at and above one panel of the triangle
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


@pytest.mark.parametrize("features", [5, 256, 520])
def test_gram_energy_is_the_trace(features: int) -> None:
    x, rows = random(40, features), random(9, features, seed=1)
    h = x.T @ x
    expected = torch.trace(rows.double() @ h.double() @ rows.double().T)
    energy = ops.gram_energy(h, rows)
    assert energy.dtype == torch.float64
    torch.testing.assert_close(energy, expected, rtol=FP32, atol=0)


def test_error_takes_dense_and_packed_weights_in_any_dtype() -> None:
    class Packed:
        def dequantize(self) -> Tensor:
            return torch.ones(2, 3, dtype=torch.bfloat16)

    weight = torch.full((2, 3), 1.25, dtype=torch.float16)
    for quantized in (Packed(), torch.ones(2, 3)):
        e = ops.error(weight, quantized)
        assert e.dtype == torch.float32
        assert torch.equal(e, torch.full((2, 3), 0.25))


def test_products_with_the_error_are_right_and_counted() -> None:
    weight, quantized = random(5, 7), random(5, 7, seed=1)
    right, left = random(7, 2, seed=2), random(5, 2, seed=3)
    matrix, dense = ErrorMatrix(weight, quantized), weight - quantized
    torch.testing.assert_close(matrix.times(right), dense @ right)
    torch.testing.assert_close(matrix.transposed_times(left), dense.T @ left)
    assert (matrix.products, tuple(matrix.shape)) == (2, (5, 7))
    assert torch.equal(matrix.dense(), dense)


def test_cholesky_solve_is_batched_and_flags_the_indefinite() -> None:
    roots = random(3, 4, 4).double()
    systems = roots @ roots.mT + torch.eye(4)
    systems[1] -= 100 * torch.eye(4)
    right = random(3, 4, 2, seed=1).double()
    solutions, info = ops.cholesky_solve(systems, right)
    assert info.tolist() == [0, 1, 0]
    torch.testing.assert_close((systems @ solutions)[[0, 2]], right[[0, 2]])


def test_orthonormalize_spans_what_is_new() -> None:
    basis = ops.orthonormalize(random(50, 6))
    y = random(50, 5, seed=1)
    q = ops.orthonormalize(y, basis)
    assert q.shape == (50, 5)
    assert_orthonormal(torch.cat([basis, q], dim=1))
    both = torch.cat([basis, q], dim=1)
    torch.testing.assert_close(both @ (both.T @ y), y, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5])
def test_orthonormalize_stands_ill_conditioned_blocks(condition: float) -> None:
    """Plain CholeskyQR in fp32 breaks near 4e3."""
    left = torch.linalg.qr(random(80, 8).double())[0]
    right = torch.linalg.qr(random(8, 8, seed=1).double())[0]
    y = (left * torch.logspace(0, -torch.tensor(condition).log10().item(), 8) @ right.T).float()
    q = ops.orthonormalize(y)
    assert q.shape[1] == 8
    assert_orthonormal(q)


def test_orthonormalize_drops_what_has_no_length_left() -> None:
    basis = ops.orthonormalize(random(40, 3))
    new = random(40, 2, seed=1)
    y = torch.cat([basis @ random(3, 2, seed=2), new, new @ random(2, 3, seed=3), torch.zeros(40, 1)], dim=1)
    q = ops.orthonormalize(y, basis)
    assert q.shape[1] == 2
    assert_orthonormal(torch.cat([basis, q], dim=1))


def test_orthonormalize_keeps_small_columns_that_are_new() -> None:
    y = random(40, 3) * torch.tensor([1e10, 1.0, 1e-10])
    q = ops.orthonormalize(y)
    assert q.shape[1] == 3
    assert_orthonormal(q)


def test_orthonormalize_fills_the_space_and_no_more() -> None:
    basis = ops.orthonormalize(random(10, 7))
    q = ops.orthonormalize(random(10, 6, seed=1), basis)
    assert q.shape[1] == 3
    full = torch.cat([basis, q], dim=1)
    assert_orthonormal(full)
    assert ops.orthonormalize(random(10, 2, seed=2), full).shape[1] == 0
    assert ops.orthonormalize(torch.zeros(10, 2)).shape[1] == 0


def test_backends_name_the_one_that_serves_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(service.backend == "reference" for service in backends("cpu").values())
    calls = []
    fast = Backend("fast", lambda h, right: calls.append("fast"))
    absent = Backend("absent", lambda h, right: calls.append("absent"), lambda device: f"not built for {device}")
    candidates = (absent, fast, *ops._BACKENDS["gram_product"])
    monkeypatch.setitem(ops._BACKENDS, "gram_product", candidates)
    ops._choose.cache_clear()
    try:
        service = backends("cpu")["gram_product"]
        assert service.backend == "fast"
        assert service.others == {"absent": "not built for cpu", "reference": "fast is preferred"}
        ops.gram_product(torch.eye(2), torch.eye(2))
        assert calls == ["fast"]
    finally:
        ops._choose.cache_clear()
