"""Orthonormal columns by CholeskyQR, with reorthogonalization and truncation, and without host synchronization.

It computes what `reference.orthonormalize` computes, for a batch of blocks, and puts a zero column in the place of each
that adds nothing to the span.

Why not plain CholeskyQR (Q = Y L⁻ᵀ, L Lᵀ = Yᵀ Y): in fp32, Yᵀ Y forgets what is shorter than √(r ε) of its column,
about 4e-3. Shifted CholeskyQR3 (Fukaya et al., SIAM J. Sci. Comput. 42(1), 2020) adds s·I, so that the factorization
goes through and each pass lengthens the shortest directions by 1 / √s. But it also lengthens rounding, until a column
that was zero is a direction like any other, and later columns have lost what they had along it. So a column too short
for this pass is *put off*: earlier columns are taken out of it, it is taken out of none, and it stays as long as what
remains of it. (Cholesky rounds alike whatever the lengths.) Columns begin with length 1, so that this is the distance
from the span of the columns before it, and tells one that is only rounding: such a column is put off until the last
pass drops it, and no other has lost anything to it.

One pass over Y (m, r), with B (m, b) the basis:

    Y = Y - B (Bᵀ Y)                            two products
    G = Yᵀ Y                                    one product, split along m
    V = inverse of the factor of G + s·diag G   `factor`, columns with a short pivot put off
    Y = Y Vᵀ                                    one product

FLOPs: 4 m r (r + b) a pass. Bytes: about 24 m r + 8 m b a pass, most of it from L2.

Products are fp32. ‖QᵀQ - I‖ and the part of a column that the span has lost, for 24 columns of condition 1e4 in 150:

    ieee     2e-7   5e-7
    tf32x3   5e-7   7e-7
    bf16x3   5e-6   5e-5
    tf32     6e-4   4e-4
"""

import torch
from torch import Tensor

from quailora.kernels.cholesky import factor, product
from quailora.kernels.padding import padded, round_up

# A pivot is a squared length, out of 1, with an error of some r ε: 2e-5 for r = 256. Above 1e-4 it is right to a digit,
# which is enough for the next pass to finish.
_LEAST_PIVOT = 1e-4

# Columns that are shorter than this part of what they were are rounding, as in `reference.orthonormalize`.
_SHORTEST = 16 * torch.finfo(torch.float32).eps

# No pass lengthens a direction, and the rounding with it, by more than 1 / √1e-6, though every single pivot be large
# (Kahan's matrix). Above the norm of the error of G, some 1e-7; well below the least pivot, for a column that depends
# on the others has a pivot not of 0 but of the shift, times one plus the squares of its coefficients.
_SHIFT = 1e-6

# Three reach down to `_SHORTEST` > (√_LEAST_PIVOT)³, the last makes orthonormal to rounding what is so to a digit.
_PASSES = 4

# If the last pass takes away half of a unit column, it lay in the span of the others all along ("twice is enough").
_LEAST_LAST_PIVOT = 0.25


def orthonormalize(y: Tensor, basis: Tensor | None = None) -> Tensor:
    """Orthonormal columns that span what each `y` (batch, m, k) adds to the span of its `basis` (batch, m, b), fp32,
    k <= 256.

    The columns of `basis` are orthonormal or zero.
    Returns q (batch, m, k) fp32. A column of `y` that the basis and the columns before it span up to rounding (1.9e-6
    of its length) gives a zero column, in its place; so at most m - b are nonzero. Where the columns before are so
    nearly dependent that rounding is more than that (up to 6e-5), and there is room, it may become a random direction
    instead, which does not harm a Rayleigh-Ritz step. If the input is not finite, the output is NaN.
    """
    m, k = y.shape[1:]
    y = padded(y, round_up(m), round_up(k))
    basis = None if basis is None else padded(basis, round_up(m), round_up(basis.shape[2]))
    lengths = torch.linalg.vector_norm(y, dim=1, keepdim=True, dtype=torch.float64)  # for squares of 1e-25 are zero
    q = y / lengths.float().clamp_min(torch.finfo(torch.float32).tiny)
    for step in range(_PASSES):
        last = step == _PASSES - 1
        if basis is not None:
            q = product(basis, product(basis.mT, q), base=q)
        inverse, _ = factor(
            product(q.mT, q),
            least=_SHORTEST**2,
            part=_LEAST_LAST_PIVOT if last else _LEAST_PIVOT,
            shift=0.0 if last else _SHIFT,
            refused=0.0 if last else 1.0,
        )
        q = product(q, inverse.mT)
    return q[:, :m, :k].contiguous()
