"""Columns to round with error feedback, for the tests of `ops.quantize_columns`."""

import torch
from torch import Tensor

from quailora.ops.reference import Columns


def block(m: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W with an outlier, feedback, and U and D of an H whose columns are correlated and unequal.

    Below the diagonal of U: NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, feedback = torch.randn(2, m, k, generator=generator)
    weight[m // 2, k // 3] = 25
    x = torch.randn(2 * k, k, generator=generator) + torch.randn(2 * k, 1, generator=generator)
    x *= 2 ** torch.randn(k, generator=generator)
    # H = U D Uᵀ from the last column backwards: the Cholesky factorization of H turned around.
    lower = torch.linalg.cholesky((x.T @ x).double().flip(0, 1)).flip(0, 1)
    factor = (lower / lower.diagonal()).float().contiguous()
    factor[torch.ones(k, k).tril(-1).bool()] = torch.nan
    return 0.02 * weight, 0.002 * feedback, factor, lower.diagonal().square().float()


def assert_same(found: Columns, expected: Columns) -> None:
    for name, ours, theirs in zip(Columns._fields, found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
