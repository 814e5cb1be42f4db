"""Operations on thin matrices on CPUs: the same results as the reference's by faster ways."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quailora.ops import reference

# Orthonormal columns that lose so much of themselves remain so up to the square of it.
_NO_LONGER_UNIT = 3e-4


def obstacle(device: torch.device) -> str | None:
    """Why they cannot serve tensors on `device`; None if they can."""
    return None if device.type == "cpu" else f"for CPUs only, not for {device.type}"


def grouped_orthonormalize(ys: Sequence[Tensor], bases: Sequence[Tensor] | None = None) -> list[Tensor]:
    return [orthonormalize(*each) for each in (zip(ys) if bases is None else zip(ys, bases, strict=True))]


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
