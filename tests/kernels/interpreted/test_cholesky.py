"""The batched Cholesky kernels against fp64 and against what torch makes of the same systems in fp32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quailora.kernels.cholesky import cholesky_solve, factor, product
from tests.helpers import interpreter

interpreter.install()

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 128, 256]
EPS = torch.finfo(torch.float32).eps


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive_definite(batch: int, r: int, condition: float, seed: int = 0) -> Tensor:
    vectors = torch.linalg.qr(random(batch, r, r, seed=seed).double()).Q
    values = condition ** -torch.linspace(0, 1, r, dtype=torch.float64)
    systems = (vectors * values) @ vectors.mT
    return ((systems + systems.mT) / 2).float()


def plain_factor(systems: Tensor) -> tuple[Tensor, Tensor]:
    return factor(systems, refused=float("nan"))


def residual(systems: Tensor, solutions: Tensor, right: Tensor) -> float:
    left = right.double() - systems.double() @ solutions.double()
    return (torch.linalg.vector_norm(left) / torch.linalg.vector_norm(right.double())).item()


@pytest.mark.parametrize("r", SIZES)
def test_the_inverse_factor_is_that_of_fp64(r: int) -> None:
    systems = positive_definite(2, r, 10)
    inverse, info = plain_factor(systems)
    expected = torch.linalg.inv(torch.linalg.cholesky(systems.double()))
    assert info.tolist() == [0, 0]
    assert torch.equal(inverse, inverse.tril())
    # The condition times some roundings: measured 1e-7 relative to the norm, for every r.
    assert torch.linalg.matrix_norm(inverse - expected).max() < 10 * EPS * torch.linalg.matrix_norm(expected).max()


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("r", [2, 16, 33, 64])
def test_residual_is_as_small_as_that_of_torch(r: int, condition: float) -> None:
    systems, right = positive_definite(3, r, condition), random(3, r, 5, seed=1)
    solutions, info = cholesky_solve(systems, right)
    peer = torch.cholesky_solve(right, torch.linalg.cholesky(systems))
    assert not info.any()
    # Both are mostly the rounding of the solution, ε · condition; which is nearer is chance, within a factor of 2.
    assert residual(systems, solutions, right) < 2 * residual(systems, peer, right) + 4 * EPS


@pytest.mark.parametrize("r", [100, 256])
def test_large_systems_at_condition_1e4(r: int) -> None:
    systems, right = positive_definite(1, r, 1e4), random(1, r, 20, seed=1)
    solutions, _ = cholesky_solve(systems, right)
    assert residual(systems, solutions, right) < 7e-5  # torch in fp32: 5e-5 to 1e-4


def test_refinement_halves_the_residual() -> None:
    systems, right = positive_definite(2, 64, 1e4), random(2, 64, 20, seed=1)
    inverse, _ = plain_factor(systems)
    before = residual(systems, inverse.mT @ (inverse @ right), right)
    after = residual(systems, cholesky_solve(systems, right)[0], right)
    assert after < 0.6 * before  # measured 0.45; what is left is the rounding of the solution itself


@pytest.mark.parametrize("r, bad", [(1, 0), (16, 15), (40, 4), (40, 15), (40, 16), (40, 39)])
def test_the_first_minor_that_is_not_positive_is_named(r: int, bad: int) -> None:
    """And the neighbors in the batch come out as if it were not there."""
    systems, right = positive_definite(3, r, 10), random(3, r, 2, seed=1)
    alone = cholesky_solve(systems[::2], right[::2])[0]
    systems[1, bad, bad] = -1.0
    systems[1, -1, -1] = -1.0
    solutions, info = cholesky_solve(systems, right)
    assert info.tolist() == torch.linalg.cholesky_ex(systems).info.tolist() == [0, bad + 1, 0]
    assert torch.equal(solutions[::2], alone)
    assert solutions[1].isnan().all()


@pytest.mark.parametrize("row, column", [(0, 0), (20, 20), (20, 3), (39, 17)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(row: int, column: int, value: float) -> None:
    systems = positive_definite(3, 40, 10)
    systems[1, row, column] = systems[1, column, row] = value
    _, info = plain_factor(systems)
    assert info.tolist() == [0, row + 1, 0]  # the first pivot it reaches


def test_singular_systems_are_named() -> None:
    systems = torch.stack([torch.zeros(20, 20), torch.ones(20, 20), torch.eye(20)])
    assert plain_factor(systems)[1].tolist() == [1, 2, 0]


def test_only_the_lower_triangle_makes_the_factor() -> None:
    systems = positive_definite(2, 40, 10)
    hidden = systems.tril() + torch.full_like(systems, 1e9).triu(1)
    assert torch.equal(plain_factor(systems)[0], plain_factor(hidden)[0])


def test_layouts_and_batch_dimensions() -> None:
    systems = positive_definite(6, 17, 10).reshape(2, 3, 17, 17)
    right = random(2, 3, 70, 17, seed=1).mT
    solutions, info = cholesky_solve(systems, right)
    assert info.shape == (2, 3) and info.dtype == torch.int32
    expected = torch.linalg.solve(systems.double(), right.double()).float()
    torch.testing.assert_close(solutions, expected, rtol=0, atol=100 * EPS * expected.abs().max().item())
    one, flag = cholesky_solve(systems[0, 0], right[0, 0])
    assert torch.equal(one, solutions[0, 0]) and flag.shape == ()


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 40), st.integers(0, 1000))
def test_any_shape(batch: int, r: int, k: int, seed: int) -> None:
    systems, right = positive_definite(batch, r, 100, seed), random(batch, r, k, seed=seed + 1)
    solutions, info = cholesky_solve(systems, right)
    assert info.tolist() == [0] * batch
    assert residual(systems, solutions, right) < 100 * EPS  # the condition
    assert torch.equal(solutions, cholesky_solve(systems, right)[0])


def test_refused_columns_leave_the_factorization() -> None:
    """Of Y with short pivots in every tile, Y Vᵀ orthonormalizes the other columns as if these were not there."""
    y = random(300, 70).double()
    short = [3, 20, 69]
    for column in short:  # 0.3 of it is new
        y[:, column] = torch.linalg.qr(y[:, :column]).Q.sum(dim=1) / column**0.5 * 300**0.5 + 0.3 * y[:, column]
    y /= torch.linalg.vector_norm(y, dim=0)
    others = [column for column in range(70) if column not in short]
    gram = (y.T @ y).float()[None]
    for refused in (1.0, 0.0):
        inverse, info = factor(gram, least=0.2, refused=refused)
        q = y @ inverse[0].double().T
        assert info.item() == short[0] + 1
        # The Gram matrix is rounded to ε, times its condition of some 10.
        torch.testing.assert_close(q[:, others].T @ q[:, others], torch.eye(67).double(), rtol=0, atol=100 * EPS)
        for column in short:
            before = q[:, [other for other in others if other < column]]
            rest = y[:, column] - before @ (before.T @ y[:, column])
            torch.testing.assert_close(q[:, column], refused * rest, rtol=0, atol=100 * EPS)


def test_a_pivot_is_above_a_part_of_its_diagonal_element() -> None:
    """Wherever it stands, and whatever its scale. Here each is 1 - 0.9² = 0.19 of it, but for the first of a pair."""
    scales = 2.0 ** torch.arange(-20, 20)
    system = torch.block_diag(*[torch.tensor([[1.0, 0.9], [0.9, 1.0]])] * 20) * scales.outer(scales)
    _, info = factor(system.expand(2, 40, 40), part=0.18, refused=1.0)
    assert info.tolist() == [0, 0]
    inverse, info = factor(system.expand(2, 40, 40), part=0.2, refused=0.0)
    assert info.tolist() == [2, 2]
    assert (inverse != 0).any(dim=2).tolist() == [[True, False] * 20] * 2
    for option in ("least", "part"):
        assert factor(torch.eye(20)[None], **{option: 1.0}, refused=0.0)[1].item() == 1


def test_the_diagonal_grows_by_a_part_of_itself() -> None:
    systems = positive_definite(2, 40, 10)
    inverse, _ = factor(systems, shift=0.5, refused=float("nan"))
    expected, _ = plain_factor(systems + 0.5 * systems.diagonal(dim1=1, dim2=2).diag_embed())
    assert torch.equal(inverse, expected)
    assert factor(torch.eye(20)[None], part=1.4, shift=0.5, refused=0.0)[1].item() == 0  # the part is of it as given


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 1000, 7), (16, 128, 33), (100, 70, 65), (33, 4000, 16)])
def test_products(m: int, k: int, n: int) -> None:
    left, right, base = random(2, k, m), random(2, k, n, seed=1), random(2, m, n, seed=2)
    expected = left.mT.double() @ right.double()
    tolerance = EPS * (8 + k)  # k roundings, in either direction, of a sum that grows to √k
    torch.testing.assert_close(product(left.mT, right).double(), expected, rtol=0, atol=tolerance)
    transposed = right.mT.contiguous().mT
    updated = product(left.mT.contiguous(), transposed, base)
    torch.testing.assert_close(updated.double(), base - expected, rtol=0, atol=tolerance)
    assert torch.equal(product(left.mT, right), product(left.mT, right))
