"""MagR against its definition, in fp64 and slowly."""

import pytest
import torch
from torch import Tensor

from quailora.quantization import magr
from quailora.quantization.magr import clip_extremes, reduce_magnitude

GROUP = 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clipped(row: Tensor, cut: float) -> Tensor:
    """By bisection on the limit."""
    low, high = 0.0, float(row.abs().max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((row.abs() - middle).clamp(min=0).sum()) > cut else (low, middle)
    return row.clamp(-high, high)


@pytest.mark.parametrize("cut", [1e-4, 0.3, 2.0, 100.0])
def test_what_is_cut_off_a_group_sums_to_the_strength(cut: float) -> None:
    values = torch.cat([random(6, 2, 8), torch.zeros(1, 2, 8), torch.ones(1, 2, 8)])
    found = clip_extremes(values, cut)
    for row, its in zip(values.double().view(-1, 8), found.view(-1, 8), strict=True):
        torch.testing.assert_close(its.double(), clipped(row, cut), rtol=1e-5, atol=1e-6)


def test_it_is_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its conditions, group by group: the objective's slope vanishes but at the extremes, which it would have
    larger; there it sums to α."""
    monkeypatch.setattr(magr, "STEPS", 400)
    weight, x = random(5, 12), random(12, 40, seed=1)
    gram = x @ x.T
    found = reduce_magnitude(weight, gram, group=GROUP, strength=0.2).double()
    alpha = 0.2 * float(weight.abs().mean()) * 1.01 * float(torch.linalg.eigvalsh(gram.double())[-1])
    slopes = (weight.double() - found) @ gram.double()
    at_extremes = 0
    for row, of_row in zip(found.view(-1, GROUP), slopes.view(-1, GROUP), strict=True):
        extreme = row.abs() > row.abs().max() - 1e-5
        assert of_row[~extreme].abs().le(1e-3 * alpha).all()
        outward = of_row[extreme] * row[extreme].sign()
        assert (outward > 0).all() and float(outward.sum()) == pytest.approx(alpha, rel=1e-3)
        at_extremes += int(extreme.sum())
    assert at_extremes > 20  # several to a group


def test_without_inputs_weights_stay() -> None:
    weight = random(3, 8)
    assert torch.equal(reduce_magnitude(weight, torch.zeros(8, 8), group=GROUP, strength=0.1), weight)


def test_a_strength_of_zero_or_weights_of_zero_change_nothing() -> None:
    x = random(8, 40, seed=1)
    weight = random(3, 8).bfloat16()
    assert torch.equal(reduce_magnitude(weight, x @ x.T, group=GROUP, strength=0.0), weight.float())
    assert not reduce_magnitude(torch.zeros(3, 8), x @ x.T, group=GROUP, strength=0.1).any()
