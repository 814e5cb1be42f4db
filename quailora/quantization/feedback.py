"""Calibrated rounding: W is rounded column by column, and the error of each column is fed back to those that follow, so
that the layer's outputs on real inputs change least. Tensors only.

This is OPTQ (GPTQ, arXiv 2210.17323), in the equivalent form of LDLQ (QuIP, arXiv 2307.13304): with

    H + λ · mean(diag H) · I = U D Uᵀ,    U unit upper triangular, D diagonal,

column j is rounded to the nearest level of w_j + Σ_{i<j} e_i U_ij, where e = w - q are the errors so far. The damped
objective is then Σ_j D_j ‖what rounding column j left‖²: D_j says how much an error in column j costs. No inverse of H
is needed. m and n are a linear's outputs and inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from quailora import ops
from quailora.errors import NotFiniteError, SolverError
from quailora.ops.precision import exact_products

BLOCK = 128  # columns that one call of `ops.quantize_columns` rounds; the errors of all before enter by one product

# Scales to try for a group, relative to the one that covers all its values: the fewer the levels, the more it pays to
# clip. (With 8 bits hardly ever.)
_CLIPS = {2: 13, 3: 13, 4: 11, 8: 4}  # bits -> 1.00, 0.95, ...: so many

# Damping to try where the Cholesky factor does not exist, each time so much more.
_MORE_DAMPING = 10.0
_MOST_DAMPING = 10.0


@dataclass(frozen=True, eq=False)
class Curvature:
    """The damped H of a linear's inputs, as error feedback uses it.

    factor: U (n, n) fp32, unit upper triangular; None is the identity, which feeds nothing back.
    importance: D (n,) fp32.
    damping: λ that was used. More than was asked for, where H had no Cholesky factor with that.
    """

    factor: Tensor | None
    importance: Tensor
    damping: float

    @classmethod
    def of(cls, gram: Tensor, damping: float) -> Self:
        """From H (n, n) fp32, symmetric. An H of zeros has no preference: rounding is then to nearest.

        Raises NotFiniteError for an H that is not finite, SolverError for one that no damping makes positive definite.
        """
        mean = gram.diagonal().mean()
        if not mean.isfinite():
            raise NotFiniteError("gram holds values that are not finite: inputs overflow in their dtype")
        if mean <= 0:
            return cls.unknown(len(gram), gram.device)
        with exact_products(gram.device):
            # The reversed matrix has a lower factor where ours has an upper one.
            damped = gram.flip(0, 1)
            while True:
                damped.diagonal().copy_(gram.diagonal().flip(0) + damping * mean)
                lower, info = torch.linalg.cholesky_ex(damped)
                if int(info) == 0:
                    break
                if damping >= _MOST_DAMPING:
                    raise SolverError(f"gram is not positive semi-definite: damping of {damping:g} does not make it so")
                damping = max(damping, 1e-3) * _MORE_DAMPING
        del damped
        factor = lower.flip(0, 1)
        scale = factor.diagonal().clone()
        return cls(factor.div_(scale), scale.square(), damping)

    @classmethod
    def unknown(cls, features: int, device: torch.device) -> Self:
        """Of inputs that nothing is known of: rounding is to nearest."""
        return cls(None, torch.ones(features, dtype=torch.float32, device=device), 0.0)

    def without_feedback(self) -> Self:
        """The same importance, for rounding to nearest."""
        return replace(self, factor=None)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Q = scale · (code - zero), or scale · levels[code], group by group."""

    codes: Tensor  # (m, n) uint8
    scales: Tensor  # (m, n / g) fp32
    zeros: Tensor  # (m, n / g) uint8
    errors: Tensor  # (m, n) fp32: what was rounded, less Q


def round_with_feedback(
    weight: Tensor,
    curvature: Curvature,
    *,
    bits: int,
    symmetric: bool,
    group: int,
    scales: Tensor | None = None,
    levels: Tensor | None = None,
) -> Rounded:
    """Round W (m, n) of any floating dtype to 2^bits levels a group of `group` columns, which divides n.

    scales, levels: as in `ops.quantize_columns`; without them the scales of integers are chosen, for the smallest
    error weighted by D, where a group begins.
    """
    rows, columns = weight.shape
    clips = clips_for(bits)
    zeros = None
    if scales is None and group > BLOCK:  # a group spans several blocks, so its scale must be known before the first
        chosen = [
            ops.choose_scales(
                part.float(), curvature.importance[start : start + group], bits=bits, symmetric=symmetric, clips=clips
            )
            for start, part in zip(range(0, columns, group), weight.split(group, dim=1), strict=True)
        ]
        scales, zeros = (torch.stack([pair[side] for pair in chosen], dim=1) for side in (0, 1))
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    found_scales = torch.empty(rows, columns // group, dtype=torch.float32, device=weight.device)
    found_zeros = torch.empty(rows, columns // group, dtype=torch.uint8, device=weight.device)
    width = BLOCK if group > BLOCK else BLOCK // group * group
    with exact_products(weight.device):
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            within = min(group, stop - start)  # all columns of a block have one scale where a group is larger than it
            groups = slice(start // group, -(-stop // group))
            if curvature.factor is None:
                feedback = torch.zeros_like(errors[:, start:stop])
                factor = torch.eye(stop - start, dtype=errors.dtype, device=errors.device)
            else:
                feedback = errors[:, :start] @ curvature.factor[:start, start:stop]
                factor = curvature.factor[start:stop, start:stop]
            part = ops.quantize_columns(
                weight[:, start:stop].float(),
                feedback,
                factor,
                curvature.importance[start:stop],
                group=within,
                bits=bits,
                symmetric=symmetric,
                clips=clips,
                scales=None if scales is None else scales[:, groups],
                zeros=None if zeros is None else zeros[:, groups],
                levels=levels,
            )
            codes[:, start:stop], errors[:, start:stop] = part.codes, part.errors
            found_scales[:, groups], found_zeros[:, groups] = part.scales, part.zeros
    return Rounded(codes, found_scales, found_zeros, errors)


def clips_for(bits: int) -> Sequence[float]:
    """Scales to try at this width, relative to the one that covers all values."""
    return [1 - 0.05 * step for step in range(_CLIPS.get(bits, 4))]
