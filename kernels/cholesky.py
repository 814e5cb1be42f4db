"""Batched Cholesky of small symmetric positive definite systems, and the thin products that apply it.

`factor_kernel` computes, for each system C (r, r) of a batch, the inverse V = L⁻¹ of its factor and an info flag:

    lower, info = torch.linalg.cholesky_ex(systems)
    inverse = torch.linalg.inv(lower)

`product_kernel` computes `left @ right` or `base - left @ right`. `cholesky_solve` uses both:

    x = inverse.mT @ (inverse @ right_hand_sides)
    x = x + inverse.mT @ (inverse @ (right_hand_sides - systems @ x))      # one step of refinement

Everything is fp32, with fp32 products: tf32 inside a factorization is wrong by 31 % at a condition of 1e4.

The factorization. One program per system, left-looking, in blocks of 16 rows. R is r rounded up to whole blocks, padded
with the identity. Block k reads the results of earlier blocks from memory (L1 and L2) and keeps only a few tiles in
registers, so that none spill for any r:

       0   k            S  = C[:, k] - L[:, :k] L[k, :k]ᵀ     the column of tiles from the diagonal down
     ┌───┐              S[k] = D Dᵀ, one column at a time, D⁻¹ alongside
     │ L ├──┐           L[below, k] = S[below] D⁻ᵀ            T rows at a time
     │   │S[k]          V[k, :k] = -D⁻¹ L[k, :k] V[:k, :k]    T columns at a time
     │   ├──┤           V[k, k]  =  D⁻¹
     │   │S │
     └───┴──┘

The next block reads what other threads have written, so there is a barrier between blocks, and nowhere else.
FLOPs: r³/3 for L and r³/3 for V. Bytes: 4 r² in, 4 r² out, the rest stays in cache. It is bound by the latency of its
r dependent columns.

The products. One program per tile of the output. A product over a long dimension (Yᵀ Y) has few tiles, so it is split
along that dimension into partial sums, added in a fixed order: the same shapes give the same bits.
FLOPs: 2 per element of (m, k, n). Bytes: each operand once per tile of the other.
"""

from collections.abc import Iterator
from itertools import product as combinations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quailora.kernels.padding import padded, round_up
from quailora.kernels.settings import FP_FUSION
from quailora.kernels.variants import Variant

# The smallest size tl.dot takes on every target, so that the column-by-column part is as small as possible.
_BLOCK = 16

# A product of fewer programs than this is split: two small ones for each multiprocessor of an A100 or H100 (108, 132).
# It is a constant rather than the device's, so that every GPU adds in the same order.
_PROGRAMS = 256

# The shortest piece worth a program of its own, and a multiple of the step below.
_LEAST_SPLIT = 128

_STEP = 32  # of a product, along the dimension it sums over

# Edge of a product's tile -> warps: 16 sums a thread, in 4 × 4, for as many reads of shared memory as multiplications
# allow. Tiles of 64 would read L2 half as often, but ptxas spills on one target or another however they are set.
_WARPS = {16: 1, 32: 2}

_STAGES = 3  # of a product: two steps are loading while one is multiplied


@triton.jit
def _factor_tile(tile, least, parts, refused, start, first_refused, BLOCK: tl.constexpr):
    """The inverse factor of a symmetric (BLOCK, BLOCK) tile; which pivots were accepted; the first that was not."""
    i = tl.arange(0, BLOCK)
    rows, columns = i[:, None], i[None, :]
    inverse = tl.where(rows == columns, 1.0, 0.0)
    accepted = i < 0
    for j in range(BLOCK):
        column = tl.sum(tl.where(columns == j, tile, 0.0), axis=1)
        row = tl.sum(tl.where(rows == j, tile, 0.0), axis=0)  # the same numbers, in the other layout
        inverse_row = tl.sum(tl.where(rows == j, inverse, 0.0), axis=0)
        pivot = tl.sum(tl.where(i == j, column, 0.0))
        good = (pivot > least) & (pivot > tl.sum(tl.where(i == j, parts, 0.0)))  # false for NaN, as 0 · inf is
        # IEEE rounding: the fast forms are less accurate, and differ between targets.
        scale = tl.where(good, tl.div_rn(1.0, tl.sqrt_rn(tl.where(good, pivot, 1.0))), 0.0)
        below = tl.where(i > j, column * scale, 0.0)
        inverse_row *= tl.where(good, scale, refused)
        tile -= below[:, None] * (row * scale)[None, :]
        inverse = tl.where(rows == j, inverse_row[None, :], inverse - below[:, None] * inverse_row[None, :])
        accepted = tl.where(i == j, good, accepted)
        first_refused = tl.where(good, first_refused, tl.where(first_refused == 0, start + j + 1, first_refused))
    return inverse, accepted, first_refused


@triton.jit(do_not_specialize=["r", "system_stride", "row_stride"])
def factor_kernel(
    systems,  # (batch, r, r) fp32, of which the lower triangle is read
    lower,  # (batch, R, R) fp32: scratch
    inverse,  # (batch, R, R) fp32: gets V
    info,  # (batch,) int32
    least,  # a pivot must be above it
    part,  # and above so much of its diagonal element
    shift,  # each diagonal element grows by so much of itself
    refused,  # what stands for 1 / √pivot, in V only, where a pivot is refused
    r,
    padded,  # R
    system_stride,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
    TALL: tl.constexpr,  # T
):
    system = tl.program_id(0).to(tl.int64)
    systems += system * system_stride
    lower += system * padded * padded
    inverse += system * padded * padded
    i = tl.arange(0, BLOCK)
    first_refused = 0
    for start in range(0, padded, BLOCK):
        rows = start + i
        high = tl.maximum(rows[:, None], rows[None, :])
        low = tl.minimum(rows[:, None], rows[None, :])
        tile = tl.load(systems + high * row_stride + low * column_stride, mask=high < r, other=0.0)
        tile = tl.where((high == low) & (high >= r), 1.0, tile)
        parts = part * tl.sum(tl.where(high == low, tile, 0.0), axis=1)
        tile = tl.where(high == low, tile + shift * tile, tile)
        for t in range(0, start, BLOCK):
            left = tl.load(lower + rows[:, None] * padded + (t + i)[None, :])
            tile -= tl.dot(left, tl.trans(left), input_precision="ieee")
        tile_inverse, accepted, first_refused = _factor_tile(tile, least, parts, refused, start, first_refused, BLOCK)
        tl.store(inverse + rows[:, None] * padded + rows[None, :], tile_inverse)

        for top in range(start + BLOCK, padded, TALL):
            below = (top + tl.arange(0, TALL))[:, None]
            panel = tl.load(
                systems + below * row_stride + rows[None, :] * column_stride,
                mask=(below < r) & (rows[None, :] < r),
                other=0.0,
            )
            for t in range(0, start, BLOCK):
                left = tl.load(lower + below * padded + (t + i)[None, :], mask=below < padded, other=0.0)
                right = tl.load(lower + rows[:, None] * padded + (t + i)[None, :])
                panel -= tl.dot(left, tl.trans(right), input_precision="ieee")
            panel = tl.dot(panel, tl.trans(tile_inverse), input_precision="ieee")
            panel = tl.where(accepted[None, :], panel, 0.0)
            tl.store(lower + below * padded + rows[None, :], panel, mask=below < padded)

        for edge in range(0, padded, TALL):
            columns = (edge + tl.arange(0, TALL))[None, :]
            strip = tl.zeros((BLOCK, TALL), dtype=tl.float32)
            for t in range(edge, start, BLOCK):  # V is lower triangular: its rows above `edge` are zero here
                left = tl.load(lower + rows[:, None] * padded + (t + i)[None, :])
                right = tl.load(inverse + (t + i)[:, None] * padded + columns, mask=columns < start, other=0.0)
                strip += tl.dot(left, right, input_precision="ieee")
            strip = -tl.dot(tile_inverse, strip, input_precision="ieee")
            others = (columns < start) | ((columns >= start + BLOCK) & (columns < padded))  # the latter get zeros
            tl.store(inverse + rows[:, None] * padded + columns, strip, mask=others)
        tl.debug_barrier()
    tl.store(info + system, first_refused)


@triton.jit(do_not_specialize=["splits"])
def product_kernel(
    left,  # (batch, m, k) fp32
    right,  # (batch, k, n) fp32
    base,  # (batch, m, n) fp32, or `out` where there is none
    out,  # (batch, splits, m, n) fp32
    m,
    n,
    k,
    splits,
    split,  # how much of k a program sums over
    left_batch,
    left_row,
    left_column,
    right_batch,
    right_row,
    right_column,
    base_batch,
    base_row,
    base_column,
    HAS_BASE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    piece = tl.program_id(2)
    batch = (piece // splits).to(tl.int64)
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
    columns = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    left += batch * left_batch + rows * left_row
    right += batch * right_batch + columns * right_column
    begin = (piece % splits) * split
    end = tl.minimum(begin + split, k)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for at in range(begin, end, STEP):
        along = at + tl.arange(0, STEP)
        x = tl.load(left + along[None, :] * left_column, mask=(rows < m) & (along[None, :] < end), other=0.0)
        y = tl.load(right + along[:, None] * right_row, mask=(columns < n) & (along[:, None] < end), other=0.0)
        total += tl.dot(x, y, input_precision="ieee")
    inside = (rows < m) & (columns < n)
    if HAS_BASE:
        total = tl.load(base + batch * base_batch + rows * base_row + columns * base_column, mask=inside) - total
    tl.store(out + (piece.to(tl.int64) * m) * n + rows * n + columns, total, mask=inside)


def factor(
    systems: Tensor, *, least: float = 0.0, part: float = 0.0, shift: float = 0.0, refused: float
) -> tuple[Tensor, Tensor]:
    """V = L⁻¹ (batch, r, r) and `info` (batch,) int32 of systems (batch, r, r) fp32, whose diagonals first grow by
    `shift` of themselves.

    A pivot that is not above `least`, or not above `part` of its diagonal element as given, is refused; `info` is the
    first one (1-based, 0 if there is none). Its column is left out of the factorization: no later one is reduced by it.
    Its row of V is computed with 1 / √pivot = `refused`: 1.0 gives what remains of the column after those before it, at
    its own length; 0.0 gives zeros; NaN gives no solution.
    """
    batch, r, _ = systems.shape
    size = round_up(r, _BLOCK)
    lower = systems.new_empty(batch, size, size)
    inverse = systems.new_empty(batch, size, size)
    info = torch.empty(batch, dtype=torch.int32, device=systems.device)
    factor_kernel[(batch,)](
        systems, lower, inverse, info, least, part, shift, refused, r, size, *systems.stride(),
        **_factor_settings(r), enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return inverse[:, :r, :r], info


def _factor_settings(r: int) -> dict[str, int]:
    """Up to 32, a system is one or two tiles: one warp, so no synchronization. Above, taller panels keep four busy.

    No pipelining: the loops that could be pipelined have only a few steps.
    """
    tall, warps = (16, 1) if r <= 32 else (64, 4)
    return {"BLOCK": _BLOCK, "TALL": tall, "num_warps": warps, "num_stages": 1}


def product(left: Tensor, right: Tensor, base: Tensor | None = None) -> Tensor:
    """`left @ right`, or `base - left @ right`: (batch, m, k) times (batch, k, n), fp32, any strides."""
    (batch, m, k), n = left.shape, right.shape[2]
    tile = 16 if min(m, n) <= 16 else 32
    tiles = triton.cdiv(m, tile) * triton.cdiv(n, tile)
    splits = 1
    if base is None:
        splits = max(1, min(triton.cdiv(_PROGRAMS, tiles * batch), triton.cdiv(k, _LEAST_SPLIT)))
    split = round_up(triton.cdiv(k, splits), _STEP)
    splits = triton.cdiv(k, split)
    out = left.new_empty(batch, splits, m, n)
    product_kernel[(triton.cdiv(m, tile), triton.cdiv(n, tile), batch * splits)](
        left, right, out if base is None else base, out, m, n, k, splits, split,
        *left.stride(), *right.stride(), *(right if base is None else base).stride(),
        HAS_BASE=base is not None, TILE=tile, STEP=_STEP,
        num_warps=_WARPS[tile], num_stages=_STAGES, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out[:, 0] if splits == 1 else out.sum(dim=1)


def cholesky_solve(systems: Tensor, right_hand_sides: Tensor) -> tuple[Tensor, Tensor]:
    """Solve symmetric positive definite systems (..., r, r) for right-hand sides (..., r, k), fp32; r, k >= 1.

    Returns the solutions (..., r, k) and `info` (...) int32: 0, or the order of the first leading minor that is not
    positive (or not finite); the solution of such a system is NaN. Both triangles of `systems` must be filled: the
    factor uses the lower one, the refinement both.
    """
    r, k = right_hand_sides.shape[-2:]
    c = systems.reshape(-1, r, r)
    inverse, info = factor(c, refused=float("nan"))
    # What is zero here stays zero in the solution.
    c, inverse = (padded(each, round_up(r), round_up(r)) for each in (c, inverse))
    y = padded(right_hand_sides.reshape(-1, r, k), round_up(r), round_up(k))

    def divide(numerator: Tensor) -> Tensor:
        return product(inverse.mT, product(inverse, numerator))

    x = divide(y)
    x = x + divide(product(c, x, base=y))
    return x[:, :r, :k].reshape(right_hand_sides.shape), info.reshape(systems.shape[:-2])


def variants(target: str) -> Iterator[Variant]:
    """The same for every target: everything is fp32 and small."""
    for r in (16, 64):  # the two settings; r itself is not a compile-time constant
        settings = _factor_settings(r)
        pointers = ("systems", "lower", "inverse")
        yield Variant(
            name=f"factor-r{r}",
            kernel=factor_kernel,
            signature=dict.fromkeys(pointers, "*fp32")
            | {"info": "*i32"}
            | dict.fromkeys(("least", "part", "shift", "refused"), "fp32")
            | dict.fromkeys(("r", "padded", "system_stride", "row_stride"), "i32"),
            constexprs={"column_stride": 1, "BLOCK": settings["BLOCK"], "TALL": settings["TALL"]},
            attrs=(*pointers, "info", "padded"),
            num_warps=settings["num_warps"],
            num_stages=settings["num_stages"],
            uses_tensor_cores=False,
            grid=lambda arguments: (len(arguments["info"]),),
        )
    strides = [f"{name}_{axis}" for name in ("left", "right", "base") for axis in ("batch", "row", "column")]
    # The layouts in use, by the strides that are 1: V Y, Vᵀ Z and Yᵀ Y, Y Vᵀ, and updates of Y by rows and by columns;
    # the last is of the transpose that als has on the right-hand side.
    layouts = {
        "plain": ("left_column", "right_column", "base_column"),
        "left-transposed": ("left_row", "right_column", "base_column"),
        "right-transposed": ("left_column", "right_row", "base_row"),
        "base-transposed": ("left_column", "right_column", "base_row"),
    }
    for (tile, warps), (layout, ones) in combinations(_WARPS.items(), layouts.items()):
        for has_base in (False, True) if layout != "base-transposed" else (True,):
            sizes = ["m", "n", "k", "split", *(name for name in strides if name not in ones)]
            yield Variant(
                name=f"product-{layout}-{'update' if has_base else 'new'}-{tile}",
                kernel=product_kernel,
                signature=dict.fromkeys(("left", "right", "base", "out"), "*fp32")
                | dict.fromkeys(("splits", *sizes), "i32"),
                constexprs=dict.fromkeys(ones, 1) | {"HAS_BASE": has_base, "TILE": tile, "STEP": _STEP},
                attrs=("left", "right", "base", "out", *sizes),
                num_warps=warps,
                num_stages=_STAGES,
                uses_tensor_cores=False,
                grid=lambda a: (triton.cdiv(a["m"], a["TILE"]), triton.cdiv(a["n"], a["TILE"]), a["splits"]),
            )
