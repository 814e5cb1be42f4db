"""Weight magnitude reduction (MagR, arXiv 2406.00800): before W is rounded, the values that are largest within a group
of columns are made smaller, as far as the layer's outputs allow, so that the group's scale covers less. Tensors only.

For each row w₀ of W, this is

    min over w of 1/2 (w - w₀) H (w - w₀)ᵀ + α Σ_g ‖w_g‖_∞,    w_g: the columns of group g

by accelerated proximal gradient steps (FISTA) of length 1/λ, where λ is the largest eigenvalue of H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quailora.ops.precision import exact_products

STEPS = 30


def reduce_magnitude(weight: Tensor, gram: Tensor, *, group: int, strength: float) -> Tensor:
    """W (m, n) of any floating dtype, with smaller extremes: (m, n) fp32. It is W where H is 0.

    gram: H (n, n) fp32. group: the columns that share a scale; it divides n.
    strength: α / λ in mean magnitudes of W: how much one step cuts off the extremes of a group.
    """
    start = weight.float()
    cut = strength * float(start.abs().mean())
    with exact_products(gram.device):
        if (largest := _largest_eigenvalue(gram)) <= 0:  # no inputs
            return start
        pull = gram / largest
        found, ahead, momentum = start, start, 1.0
        for _ in range(STEPS):
            moved = torch.addmm(ahead, ahead - start, pull, alpha=-1)
            reduced = clip_extremes(moved.view(len(start), -1, group), cut).view_as(start)
            following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
            ahead = torch.lerp(found, reduced, 1 + (momentum - 1) / following)
            found, momentum = reduced, following
    return found


def clip_extremes(values: Tensor, cut: float) -> Tensor:
    """The proximal operator of cut · ‖·‖_∞ over the last dimension: values clipped to ± the limit at which what is cut
    off sums to `cut`, or to 0 where they sum to less.

    Newton's method finds the limit. From below it does not pass it, for the sum is convex; and every step but the last
    adds values to those that are clipped, for the sum is piecewise linear.
    """
    sizes = values.abs()
    limit = sizes.amax(dim=-1, keepdim=True) - cut
    for _ in range(values.shape[-1]):
        over = (sizes - limit).clamp_min_(0)
        step = (over.sum(dim=-1, keepdim=True) - cut) / torch.count_nonzero(over, dim=-1).unsqueeze(-1).clamp_min(1)
        limit += step
        if not (step > 1e-6 * limit.abs()).any():
            break
    limit = limit.clamp_min_(0)
    return torch.minimum(torch.maximum(values, -limit), limit)


def _largest_eigenvalue(gram: Tensor) -> float:
    """Slightly above it, by power iteration with a few vectors."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(gram), min(8, len(gram)), dtype=gram.dtype, generator=generator).to(gram.device)
    for _ in range(20):
        basis = torch.linalg.qr(gram @ basis).Q
    return 1.01 * float(torch.linalg.matrix_norm(basis.T @ gram @ basis, 2))
