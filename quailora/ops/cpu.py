"""Operations on thin matrices and on E, on CPUs: the same results as the reference's by faster ways."""

import torch
from torch import Tensor

from quailora.ops import extension, reference

# Of what is rounded to bf16, this part may be lost. W - Q, both in bf16, loses nothing from NF4 and at most 7e-5 where
# its scales are quantized too.
_HALF_IS_ENOUGH = 1e-4

# Orthonormal columns that lose so much of themselves remain so up to the square of it.
_NO_LONGER_UNIT = 3e-4


def obstacle(device: torch.device) -> str | None:
    """Why these operations cannot serve tensors on `device`; None if they can."""
    return None if device.type == "cpu" else f"for CPUs only, not for {device.type}"


def energy_obstacle(device: torch.device) -> str | None:
    """The same for `gram_energy`, which takes the extension."""
    return obstacle(device) or extension.obstacle(device)


def orthonormalize(y: Tensor, basis: Tensor | None = None) -> Tensor:
    """As `reference.orthonormalize`, by Householder reflections in fp32.

    Reflections are orthonormal to rounding whatever the columns. Where one of these adds little or nothing to those
    before it and the basis, so that it matters which are dropped, the reference decides.
    """
    q, within = y, y[:0]
    if basis is not None:
        within = basis.T @ y
        q = torch.addmm(y, basis, within, alpha=-1)
    q, triangle = torch.linalg.qr(q)
    lengths = torch.cat([within, triangle]).double().square().sum(dim=0).sqrt()  # of the columns of y
    kept = q.shape == y.shape and bool((triangle.diagonal().abs() > reference.SHORTEST * lengths).all())  # of NaN, too
    if kept and basis is not None:
        # Rounding had components in the basis, which grew as columns became unit columns.
        within = basis.T @ q
        q = torch.addmm(q, basis, within, alpha=-1)
        if within.norm() > _NO_LONGER_UNIT:
            q, triangle = torch.linalg.qr(q)
            kept = bool(triangle.diagonal().abs().min() > reference.SHORTEST_AGAIN)
    return q if kept else reference.orthonormalize(y, basis)


def gram_energy(h: Tensor, rows: Tensor) -> Tensor:
    """As `reference.gram_energy`, from the triangle of Rᵀ R, which the extension computes several times as fast, in
    bf16 if that loses little. It takes as much memory as `h`."""
    if rows.dtype != torch.float32:
        return reference.gram_energy(h, rows)
    half = rows.bfloat16()
    lost = rows - half
    fits = bool(lost.norm() <= _HALF_IS_ENOUGH * rows.norm())
    products = torch.zeros_like(h)
    extension.gram_(products, half if fits else rows)
    on_diagonal = -products.diagonal()  # of which twice the triangle has one too many
    if fits:  # what squares lose has one sign, and so is made up for; what other products lose averages out
        on_diagonal += (2 * rows).sub_(lost).mul_(lost).sum(dim=0)
    twice = 2 * products.mul_(h).sum(dim=1).sum(dtype=torch.float64)
    return twice + on_diagonal.double() @ h.diagonal().double()
