"""Rounding with error feedback, kernel against reference, run by Triton's interpreter.

With the same scales, codes and errors are those of the reference to the bit: no operation is fused or reordered. Only
what a scale costs is summed in another order, so of two that cost the same up to rounding either may be chosen.
"""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quailora.kernels import quantize_columns as module
from quailora.ops import reference
from quailora.ops.reference import Columns
from quailora.ops.triton import quantize_columns
from tests.helpers import interpreter
from tests.helpers.columns import assert_same, block

interpreter.install()

CLIPS = (1.0, 0.9, 0.75)


def check(found: Columns, weight: Tensor, feedback: Tensor, factor: Tensor, importance: Tensor, **options: Any) -> None:
    """That each scale costs as little as the reference's, and that with these scales all else is the reference's."""
    group, bits, symmetric = options["group"], options["bits"], options["symmetric"]
    zeros = None if symmetric else found.zeros
    given = options | {"scales": found.scales, "zeros": zeros}
    assert_same(found, reference.quantize_columns(weight, feedback, factor, importance, **given))

    target = weight + feedback
    for j in range(target.shape[1]):
        if j % group == 0:
            part, weights, i = target[:, j : j + group], importance[j : j + group], j // group
            expected = reference.choose_scales(part, weights, bits=bits, symmetric=symmetric, clips=CLIPS)
            cost, least = (
                _cost(part, weights, scale, zero, bits)
                for scale, zero in ((found.scales[:, i], found.zeros[:, i]), expected)
            )
            # Either sum of g terms, none of them negative, is off by g 2⁻²⁴ of itself at most.
            assert (cost <= least * (1 + 4 * group * 2**-24)).all()
        target[:, j + 1 :] += found.errors[:, j, None] * factor[j, j + 1 :]


def _cost(target: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    reciprocal, zero = reference._reciprocal(scale)[:, None], zero.float()[:, None]
    codes = (torch.round(target * reciprocal) + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale[:, None] - target).square().mul(importance).sum(dim=1, dtype=torch.float64)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 2, 3, 8])
@pytest.mark.parametrize(("m", "k", "group"), [(5, 64, 32), (3, 32, 32), (6, 96, 32), (2, 128, 64), (4, 128, 128)])
def test_scales_are_searched(m: int, k: int, group: int, bits: int, symmetric: bool) -> None:
    tensors = block(m, k)
    options = {"group": group, "bits": bits, "symmetric": symmetric, "clips": CLIPS}
    check(quantize_columns(*tensors, **options), *tensors, **options)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_clip_and_sign_serves_some_row(symmetric: bool) -> None:
    """Else the search might stop at the first."""
    tensors = block(32, 32, seed=8)
    found = quantize_columns(*tensors, group=32, bits=4, symmetric=symmetric, clips=CLIPS)
    check(found, *tensors, group=32, bits=4, symmetric=symmetric, clips=CLIPS)
    whole = [
        reference.quantize_columns(*tensors, group=32, bits=4, symmetric=symmetric, clips=[clip]).scales.abs()
        for clip in CLIPS
    ]
    assert all((found.scales.abs() == scales).any() for scales in whole)
    assert (found.scales < 0).any() == symmetric


@pytest.mark.parametrize("with_zeros", [True, False])
@pytest.mark.parametrize(("k", "group", "bits"), [(64, 32, 4), (37, 37, 2), (128, 64, 8)])
def test_scales_are_given(k: int, group: int, bits: int, with_zeros: bool) -> None:
    """Of either sign, and 0 for one group; each a part of what a wider matrix has."""
    tensors, groups = block(6, k), k // group
    scales = 0.05 * torch.randn(groups, 12, generator=torch.Generator().manual_seed(5)).T[::2] / 2 ** (bits - 1)
    scales[3, 0] = 0
    zeros = (torch.arange(18 * groups) % 2**bits).to(torch.uint8).view(6, 3 * groups)[:, ::3]
    options = {"group": group, "bits": bits, "symmetric": not with_zeros, "clips": ()}
    options |= {"scales": scales, "zeros": zeros if with_zeros else None}
    assert_same(quantize_columns(*tensors, **options), reference.quantize_columns(*tensors, **options))


TABLES = {
    "nf4": get_4bit_type("nf4", device="cpu"),
    "fp4": get_4bit_type("fp4", device="cpu").sort().values,
    "2-bit": torch.tensor([-1.0, -0.25, 0.5, 1.0]),
    "8-bit": torch.linspace(-1, 1, 256) ** 3,
}


@pytest.mark.parametrize("name", TABLES)
def test_levels(name: str) -> None:
    levels = TABLES[name]
    bits, tensors = len(levels).bit_length() - 1, block(6, 64)
    scales = torch.stack([part.abs().amax(dim=1) for part in tensors[0].split(32, dim=1)], dim=1)
    options = {
        "group": 32,
        "bits": bits,
        "symmetric": False,
        "clips": (),
        "scales": scales,
        "levels": levels,
    }
    assert_same(quantize_columns(*tensors, **options), reference.quantize_columns(*tensors, **options))
    assert not scales.isnan().any()


def test_ties() -> None:
    """Halves go to the even number, and what is between two levels to the lower; far beyond the grid is its end."""
    k = 32
    weight = torch.arange(k).sub(k // 2).div(2).repeat(2, 1)
    weight[1, :8] = torch.tensor([1e30, -1e30, 2.0**22, -(2.0**22), 2.0**22 + 1.5, 2.0**24, 1e-30, -1e-30])
    unit, ones = torch.eye(k), torch.ones(k)
    options = {"group": k, "bits": 4, "symmetric": True, "clips": (), "scales": torch.ones(2, 1)}
    found = quantize_columns(weight, torch.zeros(2, k), unit, ones, **options)
    assert_same(found, reference.quantize_columns(weight, torch.zeros(2, k), unit, ones, **options))
    assert (found.codes[0] % 2 == 0)[weight[0].frac().ne(0) & (weight[0].abs() < 7)].all()
    options |= {"levels": torch.arange(-8.0, 8.0)}
    found = quantize_columns(weight, torch.zeros(2, k), unit, ones, **options)
    assert_same(found, reference.quantize_columns(weight, torch.zeros(2, k), unit, ones, **options))


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_numbers_of_fp16_and_bf16(symmetric: bool) -> None:
    """Of groups of zeros, of one sign, too small for fp16 and too large; and of spans that either rounding moves."""
    weight, feedback, factor, importance = block(24, 32)
    weight[0], feedback[0] = 0, 0
    weight[1], weight[2] = weight[1].abs() + 0.05, -weight[2].abs() - 0.05
    feedback[1:3] = 0
    sizes = torch.tensor([2e-5, 1e-6, 1e-30, 1e7])[:, None]  # at the first, the zero varies though the scale does not
    weight[3:7], feedback[3:7] = sizes * weight[3:7], sizes * feedback[3:7]
    options = {"group": 32, "bits": 4, "symmetric": symmetric, "clips": CLIPS}
    found = quantize_columns(weight, feedback, factor, importance, **options)
    check(found, weight, feedback, factor, importance, **options)
    expected = reference.quantize_columns(weight, feedback, factor, importance, **options)
    assert torch.equal(found.scales[0], expected.scales[0]) and found.scales[0] == 2**-24  # the first of equal ones
    scales = found.scales[found.scales.isfinite()]
    assert torch.equal(scales.half().float(), scales) and torch.equal(scales.bfloat16().float(), scales)


def test_nothing_beyond_the_edges_is_used() -> None:
    """The block is a part of wider matrices, of which all else is NaN."""
    m, k = 5, 32
    weight, feedback, factor, importance = block(m, k)
    options = {"group": k, "bits": 4, "symmetric": False, "clips": CLIPS}
    expected = quantize_columns(weight, feedback, factor, importance, **options)
    for width in (64, 75):
        wide = [torch.full((m + 2, width), torch.nan) for _ in range(2)] + [torch.full((k + 2, width), torch.nan)]
        parts = [of[1:-1, 16 : 16 + k].copy_(part) for of, part in zip(wide, (weight, feedback, factor), strict=True)]
        long = torch.full((k + 200,), torch.nan)
        assert_same(quantize_columns(*parts, long[:k].copy_(importance), **options), expected)
    columnwise = quantize_columns(weight.T.contiguous().T, feedback, factor.T.contiguous().T, importance, **options)
    assert_same(columnwise, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    weight, feedback, factor, importance = block(4, 32)
    options = {"group": 32, "bits": 4, "symmetric": True, "clips": CLIPS}
    expected = quantize_columns(weight, feedback, factor, importance, **options)
    weight[2, 5] = value
    found = quantize_columns(weight, feedback, factor, importance, **options)
    others = [0, 1, 3]
    assert_same(Columns(*(part[others] for part in found)), Columns(*(part[others] for part in expected)))
    assert not found.errors[2].isfinite().all()


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 32), st.integers(1, 8), st.booleans())
def test_any_shape(m: int, groups: int, group: int, bits: int, symmetric: bool) -> None:
    tensors = block(m, groups * group, seed=m)
    options = {"group": group, "bits": bits, "symmetric": symmetric, "clips": CLIPS}
    check(quantize_columns(*tensors, **options), *tensors, **options)


def test_too_many_columns_are_refused() -> None:
    with pytest.raises(AssertionError, match="expected up to 128 columns, of whole groups, got 160 of 32"):
        quantize_columns(*block(2, 160), group=32, bits=4, symmetric=True, clips=CLIPS)


def test_offsets_beyond_two_to_the_31() -> None:
    # m k = 2³¹ + 128, of which only the last four rows are touched: the rest is address space, never memory.
    m, k = 2**26 + module._ROWS, 32
    small, feedback, factor, importance = block(module._ROWS, k)
    feedback = feedback[:1].expand(m, k)
    weight = torch.empty(m, k)
    weight[-module._ROWS :] = small
    options = {"group": k, "bits": 4, "symmetric": True, "clips": CLIPS}
    with interpreter.only(m // module._ROWS - 1):
        found = quantize_columns(weight, feedback, factor, importance, **options)
    expected = quantize_columns(small, feedback[: module._ROWS], factor, importance, **options)
    assert_same(Columns(*(part[-module._ROWS :] for part in found)), expected)
