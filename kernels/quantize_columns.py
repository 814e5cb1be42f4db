"""Rounding with error feedback (GPTQ, LDLQ): a block of columns, one after the other, in one launch.

Equivalent to `quantize_columns` of `quailora/ops/reference.py`, whose arguments these are, for up to 128 columns.

    m, k, g             rows; columns; columns of a group, which divide k
    weight, feedback    (m, k) fp32, parts of wider matrices as a rule: any row stride
    factor, importance  (k, k) fp32, any row stride;  (k,) fp32
    clips               (2, number) fp32: each clip over 2^b - 1, and as it is
    scales              (m, k / g) fp32, any strides: given, or written
    zeros               (m, k / g) uint8, any strides: given
    levels              (2^b,) fp32, ascending

Rows are independent. A program takes ROWS of them and keeps all their columns in registers, from the first to the last:

              target (ROWS, 128)                For each group: the scale, by a search over all clips; then for each
        +--------------+-+-------------+        column j of it
        | errors of    |j| later       |           x      = column j of the target, by a sum over the row
        | columns < j  | | columns     |  ROWS     code   = the level nearest to x
        +--------------+-+-------------+           e      = weight_j - its value
                        e ->  += e factor_j        target = e in column j, target + e factor_j after it

Where column j of the target was, its errors stay, so a program holds two tiles, this and the codes: 32 values a thread.
One warp to a program waits for no other, and 4 rows make 256 programs of m = 1024. A lane has 16 columns of one row, so
that the sum over the row is 3 shuffles, and the rounding is done for 4 rows at once.

No multiplication is fused with an addition, and terms are added to the target in the order of the columns: with the
same scales, codes and errors are those of the reference to the bit. What a scale costs is summed in another order than
torch's, so of two that cost the same up to rounding either may be chosen.

Bytes: W and the feedback 8 m k in, errors and codes 5 m k out. For each column, a program reads row j of the factor,
512 bytes, and its column of W again, from L1. Instructions, of a warp for its 4 rows: 250 for a column, 210 for each
scale that is tried for a group (the whole tile takes part, whatever the width of the group). It is bound by them:
m = n = 4096 with 20 clips of both signs to groups of 128 are 1.3e9, or 1.5 ms of all that an H100 issues.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quailora.kernels.settings import FP_FUSION, Setting, target_of
from quailora.kernels.variants import Variant

_COLUMNS = 128  # of a tile
_ROWS = 4


@triton.jit
def _round(x):
    """To the nearest whole number, ties to even. From 2²² on the result is only about as large: no code is."""
    return (x + 12582912.0) - 12582912.0  # 1.5 · 2²³: at that size fp32 holds whole numbers only


@triton.jit
def _fp16_and_bf16(scale):
    return tl.maximum(scale.to(tl.float16).to(tl.float32).to(tl.bfloat16).to(tl.float32), 2.0**-24)


@triton.jit
def _reciprocal(scale):
    """1 / scale as IEEE rounds it, and 0 for 0."""
    return tl.where(scale == 0, 0.0, tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale)))


@triton.jit
def _cost(target, importance, scale, reciprocal, zero, top):
    """What rounding to this grid costs each row, where `importance` is not 0."""
    codes = tl.clamp(_round(target * reciprocal[:, None]) + zero[:, None], 0.0, top)
    off = (codes - zero[:, None]) * scale[:, None] - target
    return tl.sum(off * off * importance[None, :], axis=1)


@triton.jit
def _search(target, inside, importance, clips, number, top, SYMMETRIC: tl.constexpr):
    """As `choose_scales`, of the columns where `inside`: the scale and the zero of each row."""
    low = tl.min(tl.where(inside[None, :], target, 0.0), axis=1)  # 0 counts, whatever is there
    high = tl.max(tl.where(inside[None, :], target, 0.0), axis=1)
    span = 2 * tl.maximum(-low, high) if SYMMETRIC else high - low
    best = tl.full(low.shape, float("inf"), tl.float32)
    best_scale = tl.zeros_like(low)
    best_zero = tl.zeros_like(low)
    middle = tl.full(low.shape, 0.5, tl.float32) * (top + 1)
    for i in range(number):
        scale = _fp16_and_bf16(span * tl.load(clips + i))
        reciprocal = _reciprocal(scale)
        zero = middle
        if not SYMMETRIC:
            zero = tl.clamp(
                _round(-low * tl.load(clips + number + i) * reciprocal), 1.0, top
            )  # version 1 of GPTQ holds no 0
        cost = _cost(target, importance, scale, reciprocal, zero, top)
        better = cost < best
        best = tl.where(better, cost, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
        if SYMMETRIC:
            cost = _cost(target, importance, -scale, -reciprocal, zero, top)
            better = cost < best
            best = tl.where(better, cost, best)
            best_scale = tl.where(better, -scale, best_scale)
            best_zero = tl.where(better, zero, best_zero)
    return best_scale, best_zero


_SIZES = (
    "m", "k", "group", "number", "last", "weight_units", "feedback_units", "factor_units",
    "scales_row", "scales_column", "zeros_row", "zeros_column",
)  # fmt: skip

_PARTS = ("scales", "zeros")  # of a wider matrix: they may begin anywhere


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PARTS)
def quantize_columns_kernel(
    weight,
    feedback,
    factor,
    importance,
    clips,  # (2, number) fp32
    scales,
    zeros,  # (m, k / g) uint8: given, where GRID is "given zeros"
    levels,  # (last + 1,) fp32
    codes,  # (m, k) uint8
    chosen_zeros,  # (m, k / g) uint8
    errors,  # (m, k) fp32
    m,
    k,  # in units of ALIGNMENT, like the strides of rows
    group,
    number,
    last,  # the largest code
    weight_units,
    feedback_units,
    factor_units,
    scales_row,
    scales_column,
    zeros_row,
    zeros_column,
    GRID: tl.constexpr,  # "symmetric" or "asymmetric", where scales are chosen; "given", "given zeros", "levels"
    LEVELS: tl.constexpr,  # a power of two > last, where there are levels
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    CHOOSES: tl.constexpr = GRID == "symmetric" or GRID == "asymmetric"
    k *= ALIGNMENT
    groups = k // group
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    there = rows < m
    here = there[:, None] & (columns < k)[None, :]
    rows = rows.to(tl.int64)  # m n may exceed 2³¹
    weight_rows = weight + rows * (weight_units * ALIGNMENT)
    feedback_rows = feedback + rows * (feedback_units * ALIGNMENT)
    target = tl.load(weight_rows[:, None] + columns[None, :], mask=here, other=0.0)
    target += tl.load(feedback_rows[:, None] + columns[None, :], mask=here, other=0.0)
    all_codes = tl.zeros((ROWS, COLUMNS), tl.float32)
    top = last.to(tl.float32)
    if GRID == "levels":
        index = tl.arange(0, LEVELS)
        numbers = index.to(tl.float32)
        level = tl.load(levels + index, mask=index <= last, other=0.0)
        after = tl.load(levels + index + 1, mask=index < last, other=float("inf"))
        middles = (level + after) * 0.5

    for i in range(groups):
        start = i * group
        scale_ptrs = scales + rows * scales_row + i * scales_column
        if CHOOSES:
            inside = (columns >= start) & (columns < start + group)
            weights = tl.load(importance + columns, mask=inside, other=0.0)
            scale, zero = _search(target, inside, weights, clips, number, top, GRID == "symmetric")
            tl.store(scale_ptrs, scale, mask=there)
        else:
            scale = tl.load(scale_ptrs, mask=there, other=0.0)
            if GRID == "levels":
                zero = tl.zeros_like(scale)
            elif GRID == "given zeros":
                zero_ptrs = zeros + rows * zeros_row + i * zeros_column
                zero = tl.load(zero_ptrs, mask=there, other=0).to(tl.int32).to(tl.float32)
            else:
                zero = tl.zeros_like(scale) + (top + 1) * 0.5
        tl.store(chosen_zeros + rows * groups + i, zero.to(tl.int32).to(tl.uint8), mask=there)
        reciprocal = _reciprocal(scale)
        for j in range(start, start + group):
            is_j = (columns == j)[None, :]
            # Each lane loads all that it needs of the row: to share it would take shared memory and a barrier.
            row = factor + j * (factor_units * ALIGNMENT) + columns[None, :]
            u = tl.load(tl.broadcast_to(row, (ROWS, COLUMNS)), mask=(columns < k)[None, :], other=0.0)
            w = tl.load(weight_rows + j, mask=there, other=0.0)
            x = tl.sum(tl.where(is_j, target, 0.0), axis=1) * reciprocal
            if GRID == "levels":
                code = tl.sum(tl.where(middles[None, :] < x[:, None], 1.0, 0.0), axis=1)
                value = scale * tl.sum(tl.where(numbers[None, :] == code[:, None], level[None, :], 0.0), axis=1)
            else:
                code = tl.clamp(_round(x) + zero, 0.0, top)
                value = scale * (code - zero)
            error = w - value
            all_codes = tl.where(is_j, code[:, None], all_codes)
            later = tl.where((columns > j)[None, :], target + error[:, None] * u, target)
            target = tl.where(is_j, error[:, None], later)

    places = rows[:, None] * k + columns[None, :]
    tl.store(errors + places, target, mask=here)
    tl.store(codes + places, all_codes.to(tl.int32).to(tl.uint8), mask=here)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zeros and errors, as the reference."""
    m, k = weight.shape
    assert k <= _COLUMNS and k % group == 0, f"expected up to {_COLUMNS} columns, of whole groups, got {k} of {group}"
    weight, feedback, factor = (
        each if each.stride(1) == 1 else each.contiguous() for each in (weight, feedback, factor)
    )
    grid = "symmetric" if symmetric else "asymmetric"
    if scales is not None:
        grid = "levels" if levels is not None else "given" if zeros is None else "given zeros"
    codes = torch.empty(m, k, dtype=torch.uint8, device=weight.device)
    chosen_zeros = torch.empty(m, k // group, dtype=torch.uint8, device=weight.device)
    errors = weight.new_empty(m, k)
    last = (1 << bits) - 1
    tried = weight
    if scales is None:
        scales, tried = weight.new_empty(m, k // group), _clips(tuple(clips), last, weight.device)
    zeros = chosen_zeros if zeros is None else zeros
    levels = weight if levels is None else levels.contiguous()
    widths = [k, weight.stride(0), feedback.stride(0), factor.stride(0)]
    alignment = 16 if all(width % 16 == 0 for width in widths) else 1
    units = [width // alignment for width in widths]
    quantize_columns_kernel[_grid({"m": m, "ROWS": _ROWS})](
        weight, feedback, factor, importance.contiguous(), tried, scales, zeros, levels, codes, chosen_zeros, errors,
        m, units[0], group, len(clips), last, *units[1:], *scales.stride(), *zeros.stride(),
        **_constants(grid, bits), ALIGNMENT=alignment, **_setting(target_of(weight.device)), enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return codes, scales, chosen_zeros, errors


@cache
def _clips(clips: tuple[float, ...], last: int, device: torch.device) -> Tensor:
    """Copied once, for a copy to a GPU makes the host wait."""
    return torch.tensor([[clip / last for clip in clips], clips], dtype=torch.float32, device=device)


def _setting(target: str) -> Setting:
    """Left alone, ptxas would rather spill a little than give a thread more than 168 registers."""
    return {"num_warps": 1, "num_stages": 1, **({"maxnreg": 255} if target.startswith("sm_") else {})}


def _constants(grid: str, bits: int) -> dict[str, str | int]:
    return {
        "GRID": grid,
        "LEVELS": (16 if bits <= 4 else 256) if grid == "levels" else 1,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
    }


def _grid(call: Mapping[str, Any]) -> tuple[int]:
    return (triton.cdiv(call["m"], call["ROWS"]),)


def variants(target: str) -> Iterator[Variant]:
    pointers = dict.fromkeys(("weight", "feedback", "factor", "importance", "clips", "scales"), "*fp32")
    pointers |= {"zeros": "*u8", "levels": "*fp32", "codes": "*u8", "chosen_zeros": "*u8", "errors": "*fp32"}
    kinds = [(grid, 4) for grid in ("symmetric", "asymmetric", "given", "given zeros", "levels")] + [("levels", 8)]
    for (grid, bits), alignment in product(kinds, (16, 1)):
        constants, setting = _constants(grid, bits), _setting(target)
        words = [grid.replace(" ", "-"), *([str(constants["LEVELS"])] if grid == "levels" else [])]
        yield Variant(
            name="-".join([*words, *(["ragged"] if alignment == 1 else [])]),
            kernel=quantize_columns_kernel,
            signature=pointers | dict.fromkeys(_SIZES, "i32"),
            constexprs=constants | {"ALIGNMENT": alignment},
            attrs=tuple(name for name in pointers if name not in _PARTS),
            num_warps=setting["num_warps"],
            num_stages=setting["num_stages"],
            maxnreg=setting.get("maxnreg"),
            uses_tensor_cores=False,
            grid=_grid,
            uses_wide_loads=alignment == 16,
        )
