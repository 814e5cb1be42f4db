"""The solvers against a brute-force oracle, on problems as they occur and on degenerate ones."""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quailora.calibration.gram import Gram
from quailora.errors import CalibrationError, NotFiniteError, QuailoraError, SolverError
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.solvers import als, krylov
from quailora.solvers import solve as solvers
from quailora.solvers.config import SolverConfig
from quailora.solvers.error_matrix import ErrorMatrices
from quailora.solvers.inputs import Linear
from quailora.solvers.problem import Solution
from quailora.solvers.registry import SOLVERS
from quailora.solvers.solve import LoraFactors, SolverWarning, solve, solve_group

CALIBRATED = ["krylov", "als", "eigh"]

# What fp32 products lose of a sum of squares, relative to that sum: 1e-7 each, with room for a handful of them.
FP32 = 1e-6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(tokens: int, features: int, *, seed: int = 0, outlier: float = 20.0) -> Tensor:
    """Tokens (t, n) like a layer's: a decaying spectrum in some basis, a few channels `outlier` times the others."""
    g = generator(seed)
    basis = torch.linalg.qr(torch.randn(features, features, generator=g))[0]
    x = torch.randn(tokens, features, generator=g) * torch.arange(1, features + 1) ** -0.5 @ basis
    x[:, :: max(8, features // 4)] *= outlier
    return x


def nf4_pair(rows: int, columns: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A Gaussian weight and what NF4 makes of it."""
    weight = 0.02 * torch.randn(rows, columns, generator=generator(seed))
    packed, state = quantize_4bit(weight, quant_type="nf4")
    return weight, dequantize_4bit(packed, state)


def problem(rows: int, columns: int, *, seed: int = 0, outlier: float = 20.0) -> tuple[Tensor, Tensor, Tensor]:
    """W, Q, H."""
    x = inputs(4 * columns, columns, seed=seed, outlier=outlier)
    return *nf4_pair(rows, columns, seed=seed + 1), x.T @ x


def objective(error: Tensor, h: Tensor, a: Tensor, b: Tensor) -> float:
    """1/2 tr(R H Rᵀ) by definition, in fp64."""
    residual = error.double() - a.double() @ b.double().T
    return torch.trace(residual @ h.double() @ residual.T).item() / 2


def optimum(error: Tensor, h: Tensor, rank: int) -> float:
    """Half the sum of the squared singular values that rank r leaves of E H^½ (Eckart and Young), root by eigh."""
    values, vectors = torch.linalg.eigh(h.double())
    root = vectors * values.clamp_min(0).sqrt()
    return torch.linalg.svdvals(error.double() @ root)[rank:].square().sum().item() / 2


def damped(h: Tensor, damping: float) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h))


def fp32_rounding(error: Tensor, h: Tensor) -> float:
    """What fp32 products may lose of tr(E H Eᵀ) however small that is: 1e-7 of the bound on its terms."""
    return 1e-7 * (error.double().square().sum() * h.double().trace()).item()


def assert_sound(factors: LoraFactors, weight: Tensor, quantized: Tensor, h: Tensor) -> None:
    """What holds of every solution: shapes, balance, and that it reports what it did."""
    error = weight.float() - quantized.float()
    (rows, columns), rank = error.shape, factors.A.shape[1]
    assert (factors.A.shape, factors.B.shape) == ((rows, rank), (columns, rank))
    assert factors.A.dtype == factors.B.dtype == torch.float32
    assert factors.A.isfinite().all() and factors.B.isfinite().all()
    start = objective(error, h, torch.zeros(rows, 1), torch.zeros(columns, 1))
    # See solvers._CANCELLATION: summed in fp64 where little is left, else good to 1e-5 of itself and to `rounding`.
    rounding, norm = fp32_rounding(error, h), error.double().norm().item()
    slack = 1e-12 * start if factors.objective < solvers._CANCELLATION * factors.initial else rounding
    assert factors.initial == pytest.approx(start, rel=FP32, abs=rounding)
    left = max(0.0, objective(error, h, factors.A, factors.B))  # below zero where an H of rounding error is
    assert factors.objective == pytest.approx(left, rel=1e-4, abs=slack)
    residual = (error.double() - factors.A.double() @ factors.B.double().T).norm().item()
    assert factors.error_norm == pytest.approx(norm, rel=FP32)
    assert factors.residual_norm == pytest.approx(residual, rel=1e-4, abs=1e-7 * norm)
    # Balanced: both Gram matrices are the same diagonal one.
    of_a, of_b = factors.A.double().T @ factors.A.double(), factors.B.double().T @ factors.B.double()
    scale = max(of_a.abs().max().item(), 1e-30)
    torch.testing.assert_close(of_a, of_b, rtol=0, atol=FP32 * scale)
    torch.testing.assert_close(of_a, of_a.diagonal().diag(), rtol=0, atol=FP32 * scale)
    assert int((of_a.diagonal() > 0).sum()) == factors.effective_rank


def assert_falling(trace: tuple[float, ...], slack: float) -> None:
    for before, after in pairwise(trace):
        assert after <= before + slack


SHAPES = [(64, 64), (48, 160), (160, 48), (96, 96), (33, 70)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_eigh_is_the_optimum(shape: tuple[int, int], rank: int) -> None:
    weight, quantized, h = problem(*shape)
    factors = solve(weight, quantized, h, rank, solver="eigh")
    assert_sound(factors, weight, quantized, h)
    assert factors.objective == pytest.approx(optimum(weight - quantized, h, rank), rel=1e-5)


def test_what_is_little_is_measured_in_parts() -> None:
    rows, columns, rank = 2 * solvers._FP64_ROWS + 88, 48, 4
    weight, _, h = problem(rows, columns)
    low = torch.randn(rows, rank, generator=generator(1)) @ torch.randn(rank, columns, generator=generator(2))
    quantized = weight - low - 1e-3 * torch.randn(rows, columns, generator=generator(3))
    factors = solve(weight, quantized, h, rank, solver="eigh")
    assert factors.objective < solvers._CANCELLATION * factors.initial
    assert_sound(factors, weight, quantized, h)


def test_krylov_and_als_reach_the_optimum() -> None:
    excess: dict[str, list[float]] = {"krylov": [], "als": []}
    for seed, (rows, columns) in enumerate([(256, 256), (128, 384), (384, 128), (256, 192), (192, 256)]):
        weight, quantized, h = problem(rows, columns, seed=seed)
        best = optimum(weight - quantized, h, 16)
        for solver, found in excess.items():
            factors = solve(weight, quantized, h, 16, solver=solver)
            assert_sound(factors, weight, quantized, h)
            assert factors.jitter == 0
            found.append(factors.objective / best - 1)
    # Rounding may take it below the optimum, by 1e-5 at the most (see solvers._CANCELLATION).
    assert min(excess["krylov"]) > -1e-5 and min(excess["als"]) > -1e-5
    # What the default depths promise.
    assert sum(excess["krylov"]) / 5 < 2e-4
    assert sum(excess["als"]) / 5 < 2e-3


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("solver", CALIBRATED)
def test_trace_is_the_damped_objective_and_falls(solver: str, damping: float) -> None:
    weight, quantized, h = problem(80, 112)
    steps = SOLVERS[solver].iterations  # given, so that krylov does not stop before, nor go on
    factors = solve(weight, quantized, h, 8, solver=solver, iterations=steps, damping=damping, trace=True)
    error, h_damped = weight - quantized, damped(h, damping)
    assert_sound(factors, weight, quantized, h)  # the objectives are undamped
    initial = objective(error, h_damped, torch.zeros(80, 1), torch.zeros(112, 1))
    assert factors.trace[-1] == pytest.approx(objective(error, h_damped, factors.A, factors.B), abs=FP32 * initial)
    assert len(factors.trace) == (steps or 0) + 1
    # The subspaces of krylov are nested and its small problems fp64; als is evaluated through fp32 products each time.
    assert_falling(factors.trace, (1e-12 if solver == "krylov" else FP32) * initial)
    # 1 %: als has not quite converged on so small a problem; it is the damped optimum that all approach.
    assert factors.trace[-1] == pytest.approx(optimum(error, h_damped, 8), rel=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight, quantized, h = problem(*shape)
    factors = solve(weight, quantized, h, 6, solver="svd")
    assert_sound(factors, weight, quantized, h)
    error = (weight - quantized).double()
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    least = s[6:].square().sum().item() / 2
    left = (error - factors.A.double() @ factors.B.double().T).square().sum().item() / 2
    assert left == pytest.approx(least, rel=1e-5)
    assert factors.trace[-1] == pytest.approx(least, rel=1e-5)
    # Singular vectors converge by the gap to the next value, which what was drawn decides: with more steps all have.
    converged = solve(weight, quantized, h, 6, solver="svd", iterations=14)
    product, expected = converged.A.double() @ converged.B.double().T, (u[:, :6] * s[:6]) @ vt[:6]
    assert (product - expected).norm() <= 1e-4 * expected.norm()
    plain = solve(weight, quantized, torch.eye(shape[1]), 6, solver="eigh")
    assert factors.trace[-1] == pytest.approx(plain.objective, rel=1e-5)
    # als without iterations is this start.
    start = solve(weight, quantized, h, 6, solver="als", iterations=0)
    assert start.objective == pytest.approx(factors.objective, rel=1e-5)
    assert len(start.trace) == 1


def test_als_step_is_the_papers() -> None:
    weight, quantized, h = problem(30, 40)
    error = (weight - quantized).double()
    u, s, vt = torch.linalg.svd(error, full_matrices=False)
    a, b = u[:, :5] * s[:5].sqrt(), vt[:5].T * s[:5].sqrt()
    for _ in range(3):
        a = error @ h.double() @ b @ torch.linalg.inv(b.T @ h.double() @ b)
        b = error.T @ a @ torch.linalg.inv(a.T @ a)
    factors = solve(weight, quantized, h, 5, solver="als", iterations=3)
    # fp32 rounding grown by the condition of the systems: the product is far more sensitive than the objective.
    assert (factors.A.double() @ factors.B.double().T - a @ b.T).norm() <= 1e-3 * (a @ b.T).norm()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ErrorMatrices]:
    """The errors that solvers multiply with, which count their products."""
    made: list[ErrorMatrices] = []

    def keep(self: ErrorMatrices, indices: Sequence[int]) -> ErrorMatrices:
        made.append(subset(self, indices))
        return made[-1]

    subset = ErrorMatrices.subset
    monkeypatch.setattr(ErrorMatrices, "subset", keep)
    return made


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_krylov_counts_its_products(depth: int, made: list[ErrorMatrices]) -> None:
    weight, quantized, h = problem(128, 96)
    solve(weight, quantized, h, 8, iterations=depth)
    assert [matrix.products for matrix in made] == [2 * depth + 2]


@pytest.mark.parametrize("given", [False, True])
def test_krylov_ends_where_nothing_is_gained(given: bool, made: list[ErrorMatrices]) -> None:
    """After 7 blocks of 16 columns beyond the rank, of 12 in all; unless the depth is given."""
    weight, quantized, h = problem(256, 224)
    factors = solve(weight, quantized, h, 48, iterations=3 if given else None)
    assert made[0].products == 2 * (12 if given else 10)
    assert factors.objective <= (1 + 2e-4) * optimum(weight - quantized, h, 48)


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize(
    ("tokens", "outlier"), [(1024, 1.0), (64, 1.0), (1024, 1e3)], ids=["white", "singular", "outlier"]
)
def test_krylov_goes_on_where_the_spectrum_is_flat(
    tokens: int, outlier: float, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in blocks of r columns, as on a GPU."""
    monkeypatch.setattr(krylov, "narrow", lambda device: not wide)
    weight, quantized = nf4_pair(256, 256)
    x = torch.randn(tokens, 256, generator=generator(1))
    x[:, ::64] *= outlier
    h = x.T @ x
    factors = solve(weight, quantized, h, 16)
    assert_sound(factors, weight, quantized, h)
    assert factors.objective - optimum(weight - quantized, h, 16) <= 1e-3 * factors.initial


def test_krylov_begins_anew_in_wider_blocks_though_the_space_is_full() -> None:
    """Blocks of 24 columns after those of 16; some add nothing, because E is lower in rank than the basis is wide."""
    weight, quantized, h = problem(200, 40)
    factors = solve(weight, quantized, h, 24)
    assert_sound(factors, weight, quantized, h)
    assert factors.objective <= (1 + 2e-4) * optimum(weight - quantized, h, 24)


def test_krylov_finds_every_copy_of_an_eigenvalue() -> None:
    """Of which narrow blocks find no more than they have columns."""
    factors = solve(torch.eye(64), torch.zeros(64, 64), torch.eye(64), 40)
    assert factors.objective == pytest.approx(12, rel=1e-5)


@pytest.mark.parametrize("rank", [8, 15])
def test_outlier_channels_hide_no_direction_of_a_small_layer(rank: int) -> None:
    """Beside outliers most columns of the first block are rounding, and are dropped."""
    x, weight, error = torch.randn(98, 17, generator=torch.Generator().manual_seed(0)).split([68, 15, 15])
    x = x * torch.where(torch.arange(17) % 8 == 3, 1e3, 1.0)
    h = x.T @ x
    factors = solve(weight, weight - error, h, rank, damping=0.0)
    assert factors.effective_rank == rank
    start = factors.initial
    assert factors.objective <= (1 + 1e-3) * optimum(error, h, rank) + 1e-12 * start


# als divides by Bᵀ H B, whose condition is the square of the outlier: past 1000, more than its fp32 products resolve.
@pytest.mark.parametrize(
    ("solver", "outlier"), [("krylov", 1e3), ("als", 1e3), ("eigh", 1e3), ("krylov", 1e4), ("eigh", 1e4)]
)
def test_outlier_channels(solver: str, outlier: float) -> None:
    weight, quantized, h = problem(128, 128, outlier=outlier)
    factors = solve(weight, quantized, h, 16, solver=solver)
    assert_sound(factors, weight, quantized, h)
    best = optimum(weight - quantized, h, 16)
    # 1 %: fp32 resolves 1e-7 of an S whose largest eigenvalues are 1e6 to 1e8 times the others.
    assert factors.objective <= 1.01 * best


@pytest.mark.parametrize("solver", CALIBRATED)
def test_dead_channels(solver: str) -> None:
    x = inputs(400, 64)
    x[:, 10:30] = 0
    weight, quantized = nf4_pair(48, 64)
    h = x.T @ x
    factors = solve(weight, quantized, h, 8, solver=solver)
    assert_sound(factors, weight, quantized, h)
    # 0.5 %: what is left of als's convergence here; the others are within 1e-4.
    assert factors.objective <= optimum(weight - quantized, h, 8) * (1.005 if solver == "als" else 1.0002)


@pytest.mark.parametrize("solver", CALIBRATED)
def test_fewer_tokens_than_features(solver: str) -> None:
    x = inputs(24, 64)
    weight, quantized = nf4_pair(80, 64)
    h = x.T @ x
    factors = solve(weight, quantized, h, 8, solver=solver)
    assert_sound(factors, weight, quantized, h)
    assert factors.objective <= optimum(weight - quantized, h, 8) * (1.005 if solver == "als" else 1.0002)


@pytest.mark.parametrize("solver", ["krylov", "eigh"])
def test_fewer_tokens_than_the_rank_leave_nothing(solver: str) -> None:
    x = torch.randint(-8, 9, (5, 64), generator=generator(0)).float()  # so that H is exact, and its rank 5 and no more
    weight, quantized = nf4_pair(80, 64)
    h = x.T @ x
    factors = solve(weight, quantized, h, 8, solver=solver)
    assert_sound(factors, weight, quantized, h)
    assert factors.objective <= 1e-9 * factors.initial
    if solver == "eigh":  # the fp32 products of krylov leave rounding in the other directions, which does no harm
        assert factors.effective_rank == 5
        assert not factors.A[:, 5:].any() and not factors.B[:, 5:].any()


def test_als_says_when_it_needs_jitter() -> None:
    x = inputs(5, 64)
    weight, quantized = nf4_pair(80, 64)
    with pytest.warns(SolverWarning, match="not positive definite"):
        factors = solve(weight, quantized, x.T @ x, 8, solver="als")
    assert 0 < factors.jitter <= 1e-2
    assert_sound(factors, weight, quantized, x.T @ x)
    # The optimum is zero, and als is to come near it in spite of the jitter.
    assert factors.objective <= 1e-2 * factors.initial


def test_factors_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, quantized, gram = torch.randn(8, 8), torch.zeros(8, 8), torch.eye(8)
    monkeypatch.setattr(solvers, "objective", lambda *parts: torch.tensor(math.nan))
    with pytest.raises(NotFiniteError, match="q_proj: what the factors leave of the error is not finite"):
        solve_group([Linear(weight, quantized, 2, "q_proj")], gram, SolverConfig())


def test_als_gives_up_where_its_start_sees_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.diag(torch.tensor([4.0, 3.0, 1e-3, 1e-3]))
    h = torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    left = torch.eye(4)[:, :2]  # exactly: rounding would be enough for it to find its way
    start = Solution(left, weight @ left, weight @ left, weight @ left, trace=[])
    with monkeypatch.context() as patch, pytest.raises(SolverError, match="krylov"):
        patch.setattr(als, "krylov", lambda problem: [start])
        solve(weight, torch.zeros(4, 4), h, 2, solver="als")
    assert solve(weight, torch.zeros(4, 4), h, 2).objective <= 1e-9


@pytest.mark.parametrize("solver", [*CALIBRATED, "svd"])
def test_error_of_low_rank_is_taken_whole(solver: str) -> None:
    g = generator(3)
    left, right = (torch.randint(-8, 9, shape, generator=g).float() for shape in ((40, 3), (3, 50)))
    weight = left @ right  # whole numbers, so that rounding adds no rank
    x = inputs(200, 50)
    factors = solve(weight, torch.zeros(40, 50), x.T @ x, 8, solver=solver)
    assert_sound(factors, weight, torch.zeros(40, 50), x.T @ x)
    # fp32 factors of an fp32 product: rounding, squared, against the large eigenvalues of H.
    assert factors.objective <= 1e-9 * factors.initial
    assert factors.residual_norm <= 1e-5 * factors.error_norm
    assert factors.effective_rank == 3
    assert not factors.A[:, 3:].any() and not factors.B[:, 3:].any()


@pytest.mark.parametrize("shape", [(24, 100), (24, 24), (10, 12)])
def test_krylov_is_exact_when_its_basis_fills_the_space(shape: tuple[int, int]) -> None:
    weight, quantized, h = problem(*shape)
    factors = solve(weight, quantized, h, 8)
    assert_sound(factors, weight, quantized, h)
    assert len(factors.trace) < 4
    assert factors.objective == pytest.approx(optimum(weight - quantized, h, 8), rel=1e-5)


@pytest.mark.parametrize("solver", [*CALIBRATED, "svd"])
def test_full_rank_takes_everything(solver: str) -> None:
    weight, quantized, h = problem(12, 20)
    factors = solve(weight, quantized, h, 12, solver=solver)
    assert_sound(factors, weight, quantized, h)
    assert factors.objective <= 1e-9 * factors.initial


@pytest.mark.parametrize("solver", [*CALIBRATED, "svd"])
def test_nothing_to_do(solver: str) -> None:
    weight, quantized, h = problem(20, 30)
    no_error = solve(weight, weight, h, 4, solver=solver)
    assert_sound(no_error, weight, weight, h)
    assert (no_error.objective, no_error.initial, no_error.effective_rank) == (0, 0, 0)
    assert not no_error.B.any()
    no_input = solve(weight, quantized, torch.zeros(30, 30), 4, solver=solver, damping=0.1)
    assert_sound(no_input, weight, quantized, torch.zeros(30, 30))
    assert (no_input.objective, no_input.initial) == (0, 0)
    assert no_input.effective_rank == (4 if solver == "svd" else 0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    tokens=st.integers(1, 80),
    share=st.floats(0, 1),
    solver=st.sampled_from(["krylov", "eigh"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows: int, columns: int, tokens: int, share: float, solver: str, seed: int) -> None:
    g = generator(seed)
    weight, quantized = torch.randn(rows, columns, generator=g), torch.randn(rows, columns, generator=g)
    x = torch.randn(tokens, columns, generator=g)
    rank = max(1, round(share * min(rows, columns)))
    h = x.T @ x
    factors = solve(weight, quantized, h, rank, solver=solver, iterations=rows if solver == "krylov" else None)
    assert_sound(factors, weight, quantized, h)
    # As deep as there are rows, krylov has the whole space, or all of it that S reaches, and is exact up to rounding.
    best = optimum(weight - quantized, h, rank)
    assert factors.objective <= (1 + 1e-5) * best + fp32_rounding(weight - quantized, h)


@pytest.mark.parametrize("solver", [*CALIBRATED, "svd"])
def test_same_bits_twice_and_under_autocast(solver: str) -> None:
    weight, quantized, h = problem(64, 80)
    once = solve(weight, quantized, h, 8, solver=solver, seed=1)
    torch.manual_seed(123)  # the global generator must play no part, nor be moved
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        again = solve(weight.requires_grad_(), quantized, h, 8, solver=solver, seed=1)
    assert torch.equal(once.A, again.A) and torch.equal(once.B, again.B)
    assert (once.objective, once.trace) == (again.objective, again.trace)
    assert torch.equal(state, torch.get_rng_state())
    assert not again.A.requires_grad


def test_seed_is_the_start_of_krylov() -> None:
    weight, quantized, h = problem(64, 80)
    one, two = (solve(weight, quantized, h, 4, seed=seed, iterations=0) for seed in (0, 1))
    assert one.objective != two.objective


def test_gram_packed_weight_and_half_precision() -> None:
    weight, quantized = nf4_pair(64, 48)
    x = inputs(300, 48)
    gram = Gram(48)
    gram.update(x)

    class Packed:
        def dequantize(self) -> Tensor:
            return quantized.bfloat16()

    factors = solve(weight.bfloat16(), Packed(), gram, 8)
    same = solve(weight.bfloat16(), quantized.bfloat16(), gram.matrix(), 8)
    assert_sound(factors, weight.bfloat16(), quantized.bfloat16(), gram.matrix())
    assert torch.equal(factors.A, same.A)


def test_asymmetry_of_rounding_is_fine() -> None:
    weight, quantized, h = problem(40, 64)
    noisy = h * (1 + 1e-6 * torch.randn(h.shape, generator=generator(5)))
    factors = solve(weight, quantized, noisy, 8)
    assert factors.objective == pytest.approx(solve(weight, quantized, h, 8).objective, rel=1e-4)


def bad(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


W, Q, H = problem(16, 24)
MOST = torch.linalg.svd(W - Q)[2][0]  # the input the error answers most


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((W, Q, H, 4), {"solver": "kyrlov"}, r"unknown solver \(--solver\) 'kyrlov'; did you mean 'krylov'"),
        ((W, Q, H, 4), {"solver": "zzz"}, "krylov, als, eigh, svd"),
        ((W, Q, H, 0), {}, "rank must be 1 to 16 .* got 0"),
        ((W, Q, H, 17), {}, "rank must be 1 to 16 .* got 17"),
        ((W, Q[:-1], H, 4), {}, r"\(16, 24\), got \(15, 24\)"),
        ((W, Q, H[:-1, :-1], 4), {}, r"\(24, 24\) .* got \(23, 23\)"),
        ((W[0], Q, H, 4), {}, r"weight \(m, n\), got \(24,\)"),
        ((bad(W, math.nan), Q, H, 4), {}, "weight holds .* not finite"),
        ((W, bad(Q, math.inf), H, 4), {}, "quantized holds .* not finite"),
        ((W, Q, bad(H, math.nan), 4), {}, "gram holds .* not finite"),
        ((W, Q, H.tril(), 4), {}, "gram is not symmetric"),
        ((W, Q, bad(H, H.max().item()), 4), {}, "gram is not symmetric"),
        ((W, Q, -H, 4), {}, "diagonal goes down to -"),
        ((W, Q, 1.1 * MOST.square().diag() - MOST.outer(MOST), 4), {}, "not positive semi-definite"),
        ((W, Q, H, 4), {"damping": -0.1}, "damping .* got -0.1"),
        ((W, Q, H, 4), {"damping": math.nan}, "damping .* got nan"),
        ((W, Q, H, 4), {"iterations": -1}, r"iterations \(--iterations\) must be a whole number >= 0, got -1"),
        ((W, Q, H, 4), {"iterations": 1.5}, r"iterations \(--iterations\) must be a whole number >= 0, got 1.5"),
        ((W, Q, H, 4), {"seed": "a"}, r"seed \(--seed\) must be a whole number, got 'a'"),
        ((W, Q, H, 4), {"damping": "a"}, "damping .* got 'a'"),
        ((W, Q, H, 8.0), {}, "rank must be a whole number, got 8.0"),
        ((W.numpy(), Q, H, 4), {}, "weight must be a torch.Tensor; got ndarray"),
        ((W, Q.numpy(), H, 4), {}, r"quantized must be a torch.Tensor, or an object with dequantize\(\); got ndarray"),
        ((W, Q, H.numpy(), 4), {}, r"gram must be a torch.Tensor, or an object with matrix\(\); got ndarray"),
        ((W, Q, H, 4), {"iterations": 3, "solver": "eigh"}, "'eigh' takes no iterations"),
        ((W, Q, H, 4), {"precision": "fp8"}, "unknown precision 'fp8'; there are ieee, bf16x3, tf32, bf16"),
    ],
)
def test_bad_input_is_named(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(SolverError, match=message):
        solve(*arguments, **options)


@pytest.mark.parametrize("solver", [*CALIBRATED, "svd"])
def test_a_group_is_solved_as_its_linears_alone(solver: str) -> None:
    x = inputs(300, 48)
    h = x.T @ x
    pairs = [nf4_pair(64, 48), nf4_pair(40, 48, seed=1), (torch.ones(8, 48), torch.ones(8, 48))]  # the last: no error
    linears = [Linear(*pair, rank) for pair, rank in zip(pairs, (8, 5, 3), strict=True)]
    group = solve_group(linears, h, SolverConfig(solver, damping=1e-3))
    for linear, of_group in zip(linears, group, strict=True):
        alone = solve(linear.weight, linear.quantized, h, linear.rank, solver=solver, damping=1e-3)
        assert_sound(of_group, linear.weight, linear.quantized, h)
        assert of_group.A.shape == alone.A.shape
        # One product with H for all of them adds up in another order than three do.
        assert of_group.objective == pytest.approx(alone.objective, abs=FP32 * alone.initial)
        start = objective(linear.weight - linear.quantized, damped(h, 1e-3), alone.A * 0, alone.B * 0)
        assert of_group.trace[-1] == pytest.approx(alone.trace[-1], abs=FP32 * start)


@pytest.mark.parametrize("shape", [(1, 64), (64, 32), (32, 128)])
def test_packed_codes_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    weight = torch.randn(32, 64)
    for form in (BitsAndBytes("nf4", blocksize=64, compute_dtype=torch.float32), BitsAndBytes("int8")):
        with pytest.raises(SolverError, match=rf"\(32, 64\), got \({shape[0]}, {shape[1]}\)"):
            solve(weight, form.quantize(torch.randn(shape)), torch.eye(64), 4)


@pytest.mark.parametrize("damping", [1e4, 1e8])
@pytest.mark.parametrize("solver", ["krylov", "als"])
def test_the_objective_is_undamped_however_large_the_damping(solver: str, damping: float) -> None:
    found = solve(W, Q, H, 4, solver=solver, damping=damping)
    residual = W.double() - Q.double() - found.A.double() @ found.B.double().T
    assert found.objective == pytest.approx(float((residual @ H.double() * residual).sum()) / 2, rel=1e-5)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("culprit", ["weight", "quantized"])
def test_the_culprit_is_named_though_e_may_stand_where_w_was(culprit: str, overwrite: bool) -> None:
    weight = W.float().clone()
    quantized = BitsAndBytes("nf4", blocksize=64, compute_dtype=torch.float32).quantize(weight)
    (weight.view(-1) if culprit == "weight" else quantized.absmax)[3] = math.nan
    with pytest.raises(SolverError, match=f"{culprit} holds values that are not finite"):
        solve(weight, quantized, H, 4, overwrite_weight=overwrite)


def test_of_a_group_the_culprit_is_named() -> None:
    good, wrong = Linear(W, Q, 4, "block.q_proj"), Linear(W, bad(Q, math.inf), 4, "block.k_proj")
    with pytest.raises(SolverError, match=r"^block.k_proj: quantized holds"):
        solve_group([good, wrong], H, SolverConfig())
    with pytest.raises(SolverError, match=r"^block.k_proj: rank must be 1 to 16"):
        solve_group([good, Linear(W, Q, 17, "block.k_proj")], H, SolverConfig())
    with pytest.raises(SolverError, match=r"^block.q_proj, block.k_proj: gram holds"):
        solve_group([good, wrong], bad(H, math.nan), SolverConfig())
    x = inputs(5, 24)
    with pytest.warns(SolverWarning, match=r"^block.q_proj: als met systems"):
        solve_group([Linear(W, Q, 8, "block.q_proj")], x.T @ x, SolverConfig("als", damping=0.0))


def test_the_weight_is_left_alone_unless_it_may_be_overwritten() -> None:
    before = W.clone()
    for solver in SOLVERS:
        solve(W, Q, H, 4, solver=solver)
    assert torch.equal(W, before)


def test_errors_are_ours() -> None:
    with pytest.raises(QuailoraError):
        solve(W, Q, H, -1)
    with pytest.raises(CalibrationError):
        solve(W, Q, Gram(24), 4)


def test_no_warning_on_ordinary_problems() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in SOLVERS:
            solve(W, Q, H, 4, solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_callers_default_dtype_and_device_change_nothing(solver: str) -> None:
    weight, quantized, h = problem(64, 48)
    expected = solve(weight, quantized, h, 8, solver=solver)
    nothing = solve(weight, weight, h, 8, solver=solver)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = solve(weight, quantized, h, 8, solver=solver)
            assert solve(weight, weight, h, 8, solver=solver).A.dtype == nothing.A.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.A, expected.A) and torch.equal(found.B, expected.B)
