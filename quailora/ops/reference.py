"""The reference: every operation in plain torch. It defines what faster backends compute, and runs where there is none.

Letters as in the paper (QuAILoRA, arXiv 2410.14713): W, Q and E = W - Q are (m, n), H = X Xᵀ is (n, n), r is the LoRA
rank. `dispatch.py` offers the same operations with the same signatures, each served by the fastest backend.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from quailora.ops.precision import exact_products

# A triangle is processed in panels of this many features: wide enough for matrix products to run at full speed, narrow
# enough that little of the other triangle is computed.
_PANEL = 256

# Rows of W and Q that are in fp32 at a time while E is computed.
_ERROR_ROWS = 256


class Dequantizable(Protocol):
    """A quantized weight that can be dequantized."""

    def dequantize(self) -> Tensor:
        """Q (m, n): the values that the deployed forward pass multiplies by."""


class Packed(Dequantizable, Protocol):
    """A quantized weight whose codes the fused kernels read: what its property `packed` gives."""

    codes: Tensor
    exact_difference: bool  # whether W - Q, in 16 bits, is exact where both are


# E = W - Q of one layer as products take it: W and its `packed` quantized weight, or E itself and None.
Error = tuple[Tensor, Any]


def gram_(h: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
    """Add the tokens of `x` to the lower triangle of `h`, in place: h += tril(xᵀ x).

    h:     (n, n) fp32. The upper triangle means nothing until `mirror_(h)`.
    x:     (..., n), bf16, fp16 or fp32. Products and sums are fp32, whatever autocast or TF32 setting is in force.
    keep:  (...) bool, the tokens to count. The others may hold anything, NaN included.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if keep is not None:
        # tokens[keep] would make the host wait on a GPU, to learn how many there are.
        tokens = torch.where(keep.reshape(-1, 1), tokens, 0)
    tokens = tokens.float()
    with exact_products(h.device):
        for start in range(0, h.shape[0], _PANEL):
            stop = start + _PANEL
            # Product first, then sum: one running sum over a million tokens is ten times less accurate.
            h[start:stop, :stop] += tokens[:, start:stop].T @ tokens[:, :stop]


def mirror_(h: Tensor) -> None:
    """Copy the lower triangle of `h` (n, n) to the upper one, in place, a panel at a time to save memory."""
    for start in range(0, h.shape[0], _PANEL):
        stop = start + _PANEL
        h[:start, start:stop] = h[start:stop, :start].T
        diagonal = h[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)


def grouped_gram_product(h: Tensor, rights: Sequence[Tensor], *, precision: str = "ieee") -> list[Tensor]:
    """[H P₀, H P₁, ...]: symmetric (n, n) fp32 times each (n, k) fp32, in one pass over H. Here always in fp32."""
    if len(rights) == 1:
        return [h @ rights[0]]
    return list((h @ torch.cat(list(rights), dim=1)).split([right.shape[1] for right in rights], dim=1))


def gram_energy(h: Tensor, rows: Tensor) -> Tensor:
    """tr(R H Rᵀ) = ‖R X‖²_F for symmetric `h` (n, n) and `rows` (m, n): an fp64 scalar.

    Products are in the dtype of `rows`, the sum is in fp64. Only one triangle of `h` is read.
    """
    energy = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, h.shape[0], _PANEL):
        stop = start + _PANEL
        panel = rows[:, start:stop]
        triangle = h[start:stop, :stop].to(rows.dtype)
        product = 2 * (rows[:, :start] @ triangle[:, :start].T) + panel @ triangle[:, start:]
        energy += (product * panel).sum(dtype=torch.float64)
    return energy


def packed(quantized: Packed) -> Packed:
    """A quantized weight in the form that the operations on E take: here unchanged."""
    return quantized


def error(
    weight: Tensor,
    quantized: Tensor | Dequantizable,
    *,
    out: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Rows `start` to `stop` of E = W - Q: (stop - start, n), new in fp32, or written to `out`, which may be `weight`.

    weight: (m, n) of any floating-point dtype; quantized: dense or `packed`, of the same shape.
    """
    values = (quantized if isinstance(quantized, Tensor) else quantized.dequantize())[start:stop]
    rows = weight[start:stop]
    if out is None:
        out = torch.empty(rows.shape, dtype=torch.float32, device=weight.device)
    for of_out, w, q in zip(*(x.split(_ERROR_ROWS) for x in (out, rows, values)), strict=True):
        of_out.copy_(w.float() - q.to(weight.device, torch.float32))
    return out


def grouped_error_product(
    errors: Sequence[Error], rights: Sequence[Tensor], *, precision: str = "ieee"
) -> list[Tensor]:
    """[E₀ P₀, E₁ P₁, ...]: each E (m, n), all with the same n, times its P (n, r) fp32 -> (m, r) fp32.

    E is given as (weight, packed quantized weight), or as (E, None) in any floating-point dtype. `precision` is for the
    kernels; here products are always in fp32.
    """
    return [_dense(e) @ right for e, right in zip(errors, rights, strict=True)]


def grouped_error_product_t(
    errors: Sequence[Error], lefts: Sequence[Tensor], *, precision: str = "ieee"
) -> list[Tensor]:
    """[E₀ᵀ A₀, E₁ᵀ A₁, ...]: like `grouped_error_product`, each A (m, r) fp32 -> (n, r) fp32."""
    return [_dense(e).T @ left for e, left in zip(errors, lefts, strict=True)]


def _dense(e: Error) -> Tensor:
    weight, quantized = e
    return weight.float() if quantized is None else error(weight, quantized)


def cholesky_solve(systems: Tensor, right_hand_sides: Tensor) -> tuple[Tensor, Tensor]:
    """Solve symmetric positive definite systems (..., r, r) for right-hand sides (..., r, k), in their dtype.

    Returns the solutions (..., r, k) and `info` (...) int32 as `torch.linalg.cholesky_ex` does: 0, or the order of the
    first leading minor that is not positive, and then the solution means nothing.
    """
    factors, info = torch.linalg.cholesky_ex(systems)
    return torch.cholesky_solve(right_hand_sides, factors), info


def orthonormalize(y: Tensor, basis: Tensor | None = None) -> Tensor:
    """An orthonormal basis of what the columns of `y` (m, k) add to the span of `basis` (m, b).

    The columns of `basis` are orthonormal or zero. Returns (m, k) in the dtype of `y`, of whose columns
    k' <= min(k, m - b) are orthonormal and the others zero, where k' is the numerical rank of what `y` adds. (k' is
    known to the device only.)

    Two rounds in fp64: project out the basis, then orthonormalize through the eigenvectors of the block's own Gram
    matrix (SVQB, Stathopoulos and Wu, SIAM J. Sci. Comput. 23(6), 2002). This works for any condition number that an
    fp32 block can have.
    """
    q = y.double()
    known = basis.double() if basis is not None else q[:, :0]
    # The first round drops directions that are nothing but fp32 rounding. If the second then removes half of a unit
    # vector, that vector was in the span of the basis all along ("twice is enough", Kahan).
    for shortest in (16 * torch.finfo(torch.float32).eps, 0.5):
        lengths = torch.linalg.vector_norm(q, dim=0)
        q = q / torch.where(lengths > 0, lengths, 1.0)
        q -= known @ (known.T @ q)
        squares, directions = torch.linalg.eigh(q.T @ q)
        q = q @ (directions * torch.where(squares > shortest**2, squares.rsqrt(), 0.0))
    return q.to(y.dtype)
