"""How far from fp64 a product may be that was made with a given precision."""

import torch
from torch import Tensor


def _rounded(x: Tensor, precision: str) -> Tensor:
    """A factor as it enters a product of that precision."""
    if precision == "bf16":
        return x.bfloat16().double()
    if precision == "tf32":  # truncated
        return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32).double()
    if precision == "bf16x3":
        high = x.bfloat16().float()
        return high.double() + (x - high).bfloat16().double()
    return x.double()


def assert_product(actual: Tensor, left: Tensor, right: Tensor, precision: str) -> None:
    """That `actual` is left @ right (fp32), every entry off by no more than plain torch would be in that precision.

    What rounding the factors costs is computed for each entry. To that comes, relative to Σ |l| |r|: adding k terms in
    fp32, at most k 2⁻²⁴; and with bf16x3 the product of the low halves, each up to 2⁻⁹ of its factor, left out.
    """
    exact = left.double() @ right.double()
    rounding = (_rounded(left, precision) @ _rounded(right, precision) - exact).abs()
    size = left.double().abs() @ right.double().abs()
    left_out = 2**-18 if precision == "bf16x3" else 0
    allowed = rounding + (left_out + left.shape[1] * 2**-24) * size
    assert actual.shape == exact.shape and actual.dtype == torch.float32
    excess = (actual.double() - exact).abs() - allowed
    assert not (excess > 0).any() and not actual.isnan().any(), (
        f"too far by {excess.max():.3g} of {exact.abs().max():.3g}"
    )
