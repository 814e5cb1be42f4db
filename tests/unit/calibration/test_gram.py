"""Gram against the definition of H, in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quailora.calibration.gram import Gram
from quailora.errors import CalibrationError
from quailora.ops import reference

# Relative to the largest value of H: fp32 sums of these few hundred exact or once-rounded products.
FP32 = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlation(tokens: Tensor) -> Tensor:
    tokens = tokens.reshape(-1, tokens.shape[-1]).double()
    return tokens.T @ tokens


def assert_close(gram: Gram, expected: Tensor) -> None:
    h = gram.matrix()
    assert h.dtype == torch.float32
    assert torch.equal(h, h.T)
    assert (h.double() - expected).abs().max() <= FP32 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_every_dtype_are_summed_in_fp32(dtype: torch.dtype) -> None:
    x = random(300, 40).to(dtype)
    gram = Gram(40)
    gram.update(x)
    assert_close(gram, correlation(x))  # of the rounded values: nothing but the sum may round
    assert gram.tokens == 300


def test_many_batches_stay_as_accurate_as_one() -> None:
    x = random(200, 64, 8) + 1.0
    gram = Gram(8)
    for batch in x:
        gram.update(batch)
    assert_close(gram, correlation(x))


@settings(max_examples=25, deadline=None)
@given(
    leading=st.lists(st.integers(1, 5), max_size=3),
    features=st.sampled_from([1, 3, 17, 257]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_leading_shape_and_mask(leading: list[int], features: int, masked: bool, seed: int) -> None:
    x = random(*leading, features, seed=seed)
    mask = random(*leading, seed=seed + 1) > 0 if masked else torch.ones(leading, dtype=torch.bool)
    expected, tokens = correlation(x[mask]), int(mask.sum())
    x[~mask] = float("nan")
    gram = Gram(features)
    gram.update(x, mask if masked else None)
    assert gram.tokens == tokens
    if tokens:
        assert_close(gram, expected)


def test_padding_may_hold_anything_and_masks_may_be_integers() -> None:
    x, mask = random(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    expected = correlation(x[mask.bool()])
    x[mask == 0] = float("nan")
    gram = Gram(6)
    gram.update(x, mask)
    assert_close(gram, expected)
    assert gram.tokens == 4


def test_neither_order_nor_split_nor_merge_matters() -> None:
    x = random(6, 10, 12)
    one, two, reverse = Gram(12), Gram(12), Gram(12)
    one.update(x[:2])
    two.update(x[2:5])
    two.matrix()  # filling in the upper triangle must not change what follows
    two.update(x[5:])
    one.merge(two)
    for batch in x.flip(0):
        reverse.update(batch)
    assert one.tokens == reverse.tokens == 60
    assert_close(one, correlation(x))
    assert_close(reverse, correlation(x))


def test_tokens_are_counted_in_one_place() -> None:
    """Updates come from more than one stream: a new count each time would be memory of the one, freed by the other."""
    gram, other = Gram(4), Gram(4)
    h, count, place = gram._h, gram._tokens, gram._tokens.data_ptr()
    gram.update(random(3, 4))
    gram.update(random(3, 4), torch.tensor([1, 0, 1]))
    other.update(random(5, 4))
    gram.merge(other)
    gram.reduce(lambda tensor: tensor.mul_(2))
    assert gram.tokens == 20
    assert gram._h is h and gram._tokens is count and count.data_ptr() == place


def test_autocast_and_autograd_stay_outside() -> None:
    x = random(50, 16)
    gram = Gram(16)
    with torch.autocast("cpu", torch.bfloat16):
        gram.update(x.requires_grad_())
    assert_close(gram, correlation(x.detach()))
    assert not gram.matrix().requires_grad


def test_the_reference_ignores_what_precision_the_caller_allows() -> None:
    x, h = random(300, 40), torch.zeros(40, 40)
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            reference.gram_(h, x)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    expected = correlation(x).tril()
    assert (h.tril().double() - expected).abs().max() <= FP32 * expected.abs().max()


def test_errors_carry_the_values() -> None:
    gram = Gram(8)
    with pytest.raises(CalibrationError, match=r"\(\.\.\., 8\).*\(2, 3, 7\)"):
        gram.update(random(2, 3, 7))
    with pytest.raises(CalibrationError, match="int64"):
        gram.update(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(CalibrationError, match=r"\(2, 3\).*\(2, 3, 8\).*\(3, 2\)"):
        gram.update(random(2, 3, 8), torch.ones(3, 2))
    with pytest.raises(CalibrationError, match="no calibration token"):
        gram.matrix()
    gram.update(random(2, 3, 8), torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match="no calibration token"):
        gram.matrix()
    with pytest.raises(CalibrationError, match=r"9 features .* 8"):
        gram.merge(Gram(9))
