"""The reference: every operation in plain torch. It defines what faster backends compute, and runs where there is none.

Letters as in the paper (QuAILoRA, arXiv 2410.14713): W, Q and E = W - Q are (m, n), H = X Xᵀ is (n, n), r is the LoRA
rank. `dispatch.py` offers the same operations with the same signatures, each served by the fastest backend.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quailora.ops.precision import exact_products

# A triangle is processed in panels of this many features: wide enough for matrix products to run at full speed, narrow
# enough that little of the other triangle is computed. Each takes launches, so that large ones have up to `_WIDEST`.
_PANEL, _WIDEST = 256, 1024

# `orthonormalize` drops unit columns of which less than the first is left, which is rounding, and then less than the
# second: such a column was in the span of the basis all along ("twice is enough", Kahan).
SHORTEST, SHORTEST_AGAIN = 16 * torch.finfo(torch.float32).eps, 0.5

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
    for start, stop in _panels(len(h)):
        h[:start, start:stop] = h[start:stop, :start].T
        diagonal = h[start:stop, start:stop]
        diagonal.tril_()
        diagonal += diagonal.tril(-1).T


def _panels(features: int) -> Iterator[tuple[int, int]]:
    width = min(max(_PANEL, -(-features // 8)), _WIDEST)
    return ((start, min(start + width, features)) for start in range(0, features, width))


def grouped_gram_product(h: Tensor, rights: Sequence[Tensor], *, precision: str = "ieee") -> list[Tensor]:
    """[H P₀, H P₁, ...]: symmetric (n, n) fp32 times each (n, k) fp32, in one pass over H. Here always in fp32."""
    if len(rights) == 1:
        return [h @ rights[0]]
    return list((h @ torch.cat(list(rights), dim=1)).split([right.shape[1] for right in rights], dim=1))


def gram_energy(h: Tensor, rows: Tensor) -> Tensor:
    """tr(R H Rᵀ) = ‖R X‖²_F for symmetric `h` (n, n) and `rows` (m, n): an fp64 scalar.

    Products are in the dtype of `rows`, the sum is in fp64. Only one triangle of `h` is read.
    """
    energies = []
    for start, stop in _panels(len(h)):
        panel, triangle = rows[:, start:stop], h[start:stop, :stop].to(rows.dtype)
        product = panel @ triangle[:, start:]
        if start:
            product.addmm_(rows[:, :start], triangle[:, :start].T, alpha=2)
        energies.append(product.mul_(panel).sum(dtype=torch.float64))
    return torch.stack(energies).sum()


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


def grouped_orthonormalize(ys: Sequence[Tensor], bases: Sequence[Tensor] | None = None) -> list[Tensor]:
    """[orthonormalize(y₀, basis₀), ...], or without bases [orthonormalize(y₀), ...]: each (m, k), with an m and k of
    its own."""
    return [orthonormalize(*each) for each in (zip(ys) if bases is None else zip(ys, bases, strict=True))]


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
    for shortest in (SHORTEST, SHORTEST_AGAIN):
        lengths = torch.linalg.vector_norm(q, dim=0)
        q = q / torch.where(lengths > 0, lengths, 1.0)
        q -= known @ (known.T @ q)
        squares, directions = torch.linalg.eigh(q.T @ q)
        q = q @ (directions * torch.where(squares > shortest**2, squares.rsqrt(), 0.0))
    return q.to(y.dtype)


class Columns(NamedTuple):
    """What `quantize_columns` returns. Q = scale · (code - zero), or scale · levels[code], group by group."""

    codes: Tensor  # (m, k) uint8
    scales: Tensor  # (m, k / g) fp32
    zeros: Tensor  # (m, k / g) uint8: the code that stands for 0; zeros where there are levels
    errors: Tensor  # (m, k) fp32: W - Q


def quantize_columns(
    weight: Tensor,
    feedback: Tensor,
    factor: Tensor,
    importance: Tensor,
    *,
    group: int,
    bits: int,
    symmetric: bool,
    clips: Sequence[float],
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    levels: Tensor | None = None,
) -> Columns:
    """Round k columns of W, one after the other, each with the errors of those before it fed back (OPTQ, arXiv
    2210.17323, in the equivalent form of LDLQ, arXiv 2307.13304).

    With E the errors so far, column j becomes the nearest level to w_j + feedback_j + Σ_{i<j} e_i · factor_ij.

    weight:     (m, k) fp32, W.
    feedback:   (m, k) fp32: what the errors of all columns before these add.
    factor:     (k, k) fp32: the rows and columns of these in the unit upper triangular U of H = U D Uᵀ.
    importance: (k,) fp32: theirs of D. A column's error of 1 costs that much.
    group:      g, which divides k: so many columns of a row share a scale.
    bits:       b: codes are 0 to 2^b - 1, at most 8 bits.
    symmetric:  whether zero is the code 2^(b-1) everywhere, and a scale may be negative; else it varies by group.
    clips:      the scales to try for a group, relative to the one that covers all its values (`choose_scales`).
    scales:     (m, k / g) fp32 to take instead of choosing; with `zeros` where the grid is not symmetric.
    levels:     (2^b,) fp32, ascending: a table of levels in place of integers; `scales` are given with it.
    """
    rows, columns = weight.shape
    per_row = columns // group
    found = Columns(
        codes=torch.empty(rows, columns, dtype=torch.uint8, device=weight.device),
        scales=weight.new_empty(rows, per_row) if scales is None else scales,
        zeros=torch.empty(rows, per_row, dtype=torch.uint8, device=weight.device),
        errors=torch.empty_like(weight, memory_format=torch.contiguous_format),
    )
    target = weight + feedback
    middles = None if levels is None else (levels[1:] + levels[:-1]) / 2
    with exact_products(weight.device):
        for number, start in enumerate(range(0, columns, group)):
            stop = start + group
            if scales is None:
                found.scales[:, number], found.zeros[:, number] = choose_scales(
                    target[:, start:stop], importance[start:stop], bits=bits, symmetric=symmetric, clips=clips
                )
            elif levels is not None:
                found.zeros[:, number] = 0
            else:
                found.zeros[:, number] = 1 << (bits - 1) if zeros is None else zeros[:, number]
            scale, zero = found.scales[:, number], found.zeros[:, number].float()
            reciprocal = _reciprocal(scale)
            for j in range(start, stop):
                if levels is None or middles is None:
                    code = (torch.round(target[:, j] * reciprocal) + zero).clamp(0, (1 << bits) - 1)
                    value = scale * (code - zero)
                else:
                    code = torch.searchsorted(middles, target[:, j] * reciprocal)
                    value = scale * levels[code]
                found.codes[:, j] = code.to(torch.uint8)
                found.errors[:, j] = weight[:, j] - value
                target[:, j + 1 :] += found.errors[:, j, None] * factor[j, j + 1 :]
    return found


def choose_scales(
    target: Tensor, importance: Tensor, *, bits: int, symmetric: bool, clips: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The scale (m,) fp32 and the zero (m,) uint8 for each row of `target` (m, g), where rounding each value to the
    nearest level costs least, weighted by `importance` (g,).

    Of the scale that covers all values, the fractions in `clips` are tried, in a symmetric grid with either sign: the
    side with one level more then serves the larger values. Ties go to the first. Every scale is a number that fp16 and
    bf16 both hold, so that Q is the same wherever it is computed.
    """
    top = (1 << bits) - 1
    low, high = target.amin(dim=1).clamp(max=0), target.amax(dim=1).clamp(min=0)
    best = target.new_full((len(target),), torch.inf)
    scales, zeros = torch.zeros_like(best), torch.zeros_like(best)
    for clip in clips:
        span = (2 * torch.maximum(-low, high) if symmetric else high - low) * (clip / top)
        for scale in (fp16_and_bf16(span), -fp16_and_bf16(span))[: 1 + symmetric]:
            reciprocal = _reciprocal(scale)
            zero = torch.full_like(scale, 1 << (bits - 1))
            if not symmetric:
                zero = torch.round(-low * clip * reciprocal).clamp(1, top)  # version 1 of GPTQ holds no 0
            codes = (torch.round(target * reciprocal[:, None]) + zero[:, None]).clamp(0, top)
            off = (codes - zero[:, None]) * scale[:, None] - target
            cost = (off * off * importance).sum(dim=1)
            better = cost < best
            best = torch.where(better, cost, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros.to(torch.uint8)


def fp16_and_bf16(scales: Tensor) -> Tensor:
    """Scales >= 0 rounded to numbers that fp16 and bf16 both hold; the least is 2^-24, for a group of zeros."""
    return scales.half().bfloat16().float().clamp_min(2.0**-24)


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of 0."""
    return torch.where(scales == 0, 0.0, 1 / scales)
