"""CholeskyQR with columns put off: orthonormal, the span kept, what adds nothing exactly zero; against fp64 algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quailora.kernels import orthonormalize as module
from quailora.ops import reference
from tests.helpers import interpreter

interpreter.install()

# Of ‖QᵀQ - I‖: the last pass is a product with a matrix next to I, each entry a sum of products rounded to 6e-8.
# Measured 2e-7 to 4e-7, whatever the condition.
ORTHONORMAL = 1e-6

# Of a unit column of y, what may be missing in the span: a pass multiplies rounding (6e-8) by up to 1 / √1e-6, were it
# all in one direction, and what is dropped is shorter than 1.9e-6. Measured below 1e-6; 8e-6 where y is singular and
# its other columns ill-conditioned.
LOST = 2e-5


def orthonormalize(y: Tensor, basis: Tensor | None = None) -> Tensor:
    return module.orthonormalize(y[None], None if basis is None else basis[None])[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioned(m: int, k: int, condition: float) -> Tensor:
    left, right = torch.linalg.qr(random(m, k).double()).Q, torch.linalg.qr(random(k, k, seed=1).double()).Q
    return ((left * condition ** -torch.linspace(0, 1, k, dtype=torch.float64)) @ right.T).float()


def check(y: Tensor, basis: Tensor | None = None) -> Tensor:
    """Orthonormalize, assert all that is promised, and return the result without its zero columns."""
    q = orthonormalize(y, basis)
    assert q.shape == y.shape and q.dtype == torch.float32
    kept = (q != 0).any(dim=0)
    full = (q[:, kept] if basis is None else torch.cat([basis, q[:, kept]], dim=1)).double()
    assert torch.linalg.matrix_norm(full.T @ full - torch.eye(full.shape[1]).double(), ord=2) < ORTHONORMAL
    lengths = torch.linalg.vector_norm(y.double(), dim=0)
    rest = torch.linalg.vector_norm(y.double() - full @ (full.T @ y.double()), dim=0)
    assert (rest <= LOST * lengths).all()
    return q[:, kept]


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e5, 1e7])
def test_any_condition(condition: float) -> None:
    """Plain CholeskyQR breaks near 4e3 in fp32."""
    assert check(conditioned(150, 24, condition)).shape[1] == 24


def test_what_the_passes_do_not_reach_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than left as it is: with too few passes, columns are missing, but those that are there are right."""
    monkeypatch.setattr(module, "_PASSES", 2)
    q = orthonormalize(conditioned(150, 24, 1e7)).double()
    kept = q[:, (q != 0).any(dim=0)]
    assert 4 < kept.shape[1] < 24
    # Pivots of the last pass are above 1/4, and so lose two digits at most of a Gram matrix that is right to a few ε.
    assert torch.linalg.matrix_norm(kept.T @ kept - torch.eye(kept.shape[1]).double(), ord=2) < 1e-5


def test_a_wide_block() -> None:
    assert check(conditioned(200, 100, 2e4)).shape[1] == 100


def test_every_pivot_large_and_yet_nearly_singular() -> None:
    """Kahan's matrix, of condition 3e7 here: no single column tells. How rounding falls decides what is lost without a
    shift, so there are several."""
    sine, cosine = torch.tensor(1.3).sin().double(), torch.tensor(1.3).cos().double()
    kahan = sine ** torch.arange(60)[:, None] * (torch.eye(60) - cosine * torch.ones(60, 60).triu(1))
    for seed in range(4):
        y = (torch.linalg.qr(random(100, 60, seed=seed).double()).Q @ kahan).float()
        assert torch.linalg.cond(y.double()) > 1e7
        assert check(y).shape[1] == 60


def test_spanned_and_zero_columns_are_zero_in_their_place() -> None:
    new = random(100, 20)
    y = torch.cat([new[:, :10], new[:, :10] @ random(10, 3, seed=1), torch.zeros(100, 1), new[:, 10:]], dim=1)
    q = orthonormalize(y)
    assert [column for column in range(24) if not q[:, column].any()] == [10, 11, 12, 13]
    assert check(y).shape[1] == 20


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e6])
def test_singular_and_ill_conditioned(condition: float) -> None:
    """Columns that only look new, and are found out later, must not have taken anything from those after them. Which
    ones look new is a matter of rounding, so that one draw says little."""
    for seed in range(1, 6):
        some = conditioned(120, 16, condition)
        y = torch.cat([some, some @ random(16, 6, seed=seed), random(120, 4, seed=10 + seed)], dim=1)
        assert 20 <= check(y).shape[1] <= 22  # beside what there is, a direction of chance or two


def test_lengths_are_those_of_the_columns_given() -> None:
    """The third has 5e-7 to add, though 0.05 of what the second pass makes of it."""
    a, u, v = torch.linalg.qr(random(100, 3).double()).Q.T
    y = torch.stack([a, a + 1e-5 * u, a + 1e-5 * u + 5e-7 * v], dim=1).float()
    assert check(y).shape[1] == 2


def test_nothing_new_is_all_zeros() -> None:
    basis = check(random(100, 30))
    assert check(basis @ random(30, 12, seed=1), basis).shape[1] == 0
    assert not orthonormalize(torch.zeros(20, 3)).any()


@pytest.mark.parametrize("part", [1e-1, 1e-3, 1e-5])
def test_a_little_outside_the_basis(part: float) -> None:
    """Across the blocks of a Krylov basis, conditions of 1e7 are common."""
    basis = check(random(100, 30))
    y = basis @ random(30, 12, seed=1) + part * random(100, 12, seed=2)
    assert check(y, basis).shape[1] == 12


@pytest.mark.parametrize("m, b, k", [(60, 48, 16), (10, 0, 16), (33, 32, 4), (20, 20, 5)])
def test_no_more_columns_than_there_is_room_for(m: int, b: int, k: int) -> None:
    basis = check(random(m, b)) if b else None
    assert check(random(m, k, seed=1), basis).shape[1] == m - b


def test_zero_columns_of_the_basis_do_no_harm() -> None:
    basis = torch.cat([orthonormalize(random(50, 5)), torch.zeros(50, 4)], dim=1)
    y = random(50, 6, seed=1)
    assert torch.equal(orthonormalize(y, basis), orthonormalize(y, basis[:, :5].contiguous()))


def test_a_batch_is_its_blocks_alone() -> None:
    """To the bit where products are split alike. Rows of zeros, by which heights are made equal, change nothing."""
    y, basis = random(3, 50, 6), torch.zeros(3, 50, 5)
    y[1, 40:] = y[2, :, 3] = 0
    for i, rows in enumerate((50, 40, 50)):
        basis[i, :rows] = orthonormalize(random(rows, 5, seed=i))
    found = module.orthonormalize(y, basis)
    for i in range(3):
        assert torch.equal(found[i], orthonormalize(y[i], basis[i]))
    assert not found[1, 40:].any() and not found[2, :, 3].any()
    torch.testing.assert_close(found[1, :40], orthonormalize(y[1, :40], basis[1, :40]), rtol=0, atol=ORTHONORMAL)


def test_scales_do_not_matter() -> None:
    y = random(40, 4)
    scales = torch.tensor([2.0**100, 1.0, 2.0**-100, 2.0**-3])
    assert torch.equal(orthonormalize(y * scales), orthonormalize(y))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_in_not_finite_out(value: float) -> None:
    y = random(20, 3)
    y[4, 1] = value
    assert orthonormalize(y).isnan().any()


def test_the_rank_is_that_of_the_reference() -> None:
    basis = check(random(80, 20))
    y = torch.cat([basis @ random(20, 4, seed=1), random(80, 6, seed=2) @ random(6, 10, seed=3)], dim=1)
    expected = reference.orthonormalize(y, basis)
    assert check(y, basis).shape[1] == expected.any(dim=0).sum() == 6


def test_krylov_on_zero_columns_finds_the_eigenvalues() -> None:
    """As `solvers.krylov` would: four blocks of 16 in 40 dimensions, so that 24 columns have to be zero."""
    e = conditioned(40, 40, 1e3)
    s = e @ e.T
    block = basis = orthonormalize(s @ random(40, 16, seed=5))
    for _ in range(3):
        block = orthonormalize(s @ block, basis)
        basis = torch.cat([basis, block], dim=1)
    assert int((basis != 0).any(dim=0).sum()) == 40
    values = torch.linalg.eigvalsh(basis.double().T @ s.double() @ basis.double())
    expected = torch.linalg.eigvalsh(s.double())
    torch.testing.assert_close(values[-40:], expected, rtol=0, atol=1e-6)  # ORTHONORMAL · ‖S‖
    assert values[:24].abs().max() < 1e-12  # those of the zero columns


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(1, 150), st.integers(0, 20), st.integers(1, 24), st.integers(0, 1000))
def test_any_shape(m: int, b: int, k: int, seed: int) -> None:
    b = min(b, m)
    basis = torch.linalg.qr(random(m, b, seed=seed)).Q if b else None
    y = random(m, k, seed=seed + 1)
    assert check(y, basis).shape[1] == min(k, m - b)
    assert torch.equal(orthonormalize(y, basis), orthonormalize(y, basis))


def test_short_is_meant_of_the_length_not_of_the_largest_entry() -> None:
    """1024 equal entries are 32 times as long as the largest of them."""
    same, turns = torch.ones(1024), torch.tensor([1.0, -1.0]).repeat(512)
    assert check(torch.stack([same, same + 1e-6 * turns], dim=1)).shape[1] == 1
    assert check(torch.stack([same, same + 1e-5 * turns], dim=1)).shape[1] == 2


def test_every_pass_is_needed() -> None:
    """With one less, 42 columns are found here."""
    assert check(conditioned(150, 48, 1e7)).shape[1] == 48
