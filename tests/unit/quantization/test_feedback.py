"""Calibrated rounding: its algebra, and what it is compared with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quailora.errors import NotFiniteError, SolverError
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.feedback import Curvature, round_with_feedback
from quailora.quantization.gptq import GPTQ


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(features: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """H of inputs with a few strong directions and some loud channels."""
    x = random(tokens, features, seed=seed) @ (random(features, features, seed=seed + 1) / features**0.5)
    x[:, :3] *= 10
    return x.T @ x


def energy(error: Tensor, h: Tensor) -> float:
    return float(((error.double() @ h.double()) * error.double()).sum())


def test_the_factors_multiply_to_the_damped_h() -> None:
    h = correlated(96)
    found = Curvature.of(h, 0.1)
    assert found.factor is not None and found.damping == 0.1
    assert torch.equal(found.factor.diagonal(), torch.ones(96)) and not found.factor.tril(-1).any()
    damped = h + 0.1 * h.diagonal().mean() * torch.eye(96)
    product = (found.factor * found.importance) @ found.factor.T
    torch.testing.assert_close(product, damped, rtol=0, atol=1e-5 * damped.abs().max().item())


def test_the_damped_objective_is_the_sum_of_what_each_column_left() -> None:
    """Which is why D weighs the search for scales."""
    weight, h = 0.1 * random(32, 96), correlated(96)
    curvature = Curvature.of(h, 0.1)
    assert curvature.factor is not None
    rounded = round_with_feedback(weight, curvature, bits=3, symmetric=True, group=32)
    left = rounded.errors @ curvature.factor  # e_j + Σ_{i<j} e_i U_ij: the rounding residual of column j
    damped = h + 0.1 * h.diagonal().mean() * torch.eye(96)
    assert (left.square().sum(0) * curvature.importance).sum().item() == pytest.approx(
        energy(rounded.errors, damped), rel=1e-4
    )


@pytest.mark.parametrize("group", [32, 64, 128, 320])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_are_joined_without_a_seam(group: int, symmetric: bool) -> None:
    """More columns than a block has, and a last block that is not whole: the same as in one call."""
    columns = 320 if group != 128 else 384
    weight, h = 0.1 * random(24, columns), correlated(columns, 800)
    curvature = Curvature.of(h, 0.1)
    rounded = round_with_feedback(weight, curvature, bits=4, symmetric=symmetric, group=group)
    q = rounded.scales.repeat_interleave(group, 1) * (
        rounded.codes.float() - rounded.zeros.float().repeat_interleave(group, 1)
    )
    torch.testing.assert_close(weight - q, rounded.errors, rtol=0, atol=1e-6)
    assert curvature.factor is not None
    steps = (rounded.errors @ curvature.factor) / rounded.scales.repeat_interleave(group, 1)
    inside = (rounded.codes > 0) & (rounded.codes < 15)
    assert (steps[inside].abs() <= 0.501).all()  # each was rounded to the nearest level of what it had become


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4]),
    tokens=st.integers(1, 200),
    damping=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_feedback_costs_no_more_than_nearest_rounding(seed: int, bits: int, tokens: int, damping: float) -> None:
    """By the damped objective that it works on, of the same grids, over all rows together."""
    weight, h = 0.1 * random(64, 64, seed=seed), correlated(64, tokens, seed)
    curvature = Curvature.of(h, damping)
    damped = h + damping * h.diagonal().mean() * torch.eye(64)
    found = [
        energy(round_with_feedback(weight, each, bits=bits, symmetric=True, group=32).errors, damped)
        for each in (curvature, curvature.without_feedback())
    ]
    assert found[0] <= 1.02 * found[1]


def test_where_h_has_no_preference_rounding_is_to_nearest() -> None:
    weight = 0.1 * random(32, 64)
    base = GPTQ(3, 32)
    for h in (torch.zeros(64, 64), 7 * torch.eye(64)):
        found = base.calibrated(weight, Curvature.of(h, 0.1))
        assert torch.equal(found.codes, base.quantize(weight).codes)


def test_an_h_without_a_cholesky_factor_gets_more_damping() -> None:
    h = torch.ones(32, 32)
    h[0, 0] = -0.5  # as no sum of x xᵀ is, but rounding may make something like it
    found = Curvature.of(h, 1e-3)
    assert found.damping > 1e-3 and found.factor is not None and found.factor.isfinite().all()


def test_an_h_that_no_damping_mends_is_refused() -> None:
    h = torch.eye(32)
    h[:2, :2] = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    with pytest.raises(SolverError, match="not positive semi-definite: damping of 10"):
        Curvature.of(h, 0.1)
    h[0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="not finite"):
        Curvature.of(h, 0.1)


def test_the_callers_default_dtype_does_not_matter() -> None:
    weight, curvature = 0.1 * random(32, 64), Curvature.of(correlated(64), 0.1)
    base = GPTQ(3, 32)
    expected = [base.calibrated(weight, curvature), base.quantize(weight)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [base.calibrated(weight, Curvature.of(correlated(64).float(), 0.1)), base.quantize(weight)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[1].codes, expected[1].codes) and found[0].scales.dtype == torch.float16


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_codes_of_4_bits_are_chosen_on_the_absmax_of_nearest_rounding(method: str, double: bool) -> None:
    base = BitsAndBytes(method, double=double, blocksize=64, compute_dtype=torch.float32)
    weight, h = 0.1 * random(64, 128), correlated(128)
    nearest, chosen = base.quantize(weight), base.calibrated(weight, Curvature.of(h, 0.01))
    assert all(torch.equal(a, b) for a, b in zip(nearest.parts()[1], chosen.parts()[1], strict=True))
    assert energy(weight - chosen.dequantize(), h) < 0.7 * energy(weight - nearest.dequantize(), h)
    same = base.calibrated(weight, Curvature.unknown(128, torch.device("cpu")))
    off = (weight - same.dequantize()).abs() - (weight - nearest.dequantize()).abs()
    assert (off <= 1e-7).all()  # bitsandbytes chooses codes before absmax is itself rounded
    assert double or torch.equal(same.dequantize(), nearest.dequantize())
