"""H P for a symmetric H, read from its lower triangle only, for all linears that share the input H belongs to.

Equivalent to
    gram_product(h, right)              (h.tril() + h.tril(-1).T) @ right        (n, n) (n, k) -> (n, k)
    grouped_gram_product(h, rights)     [gram_product(h, right) for right in rights], in one launch

    n       inputs of the linears
    k       columns of P: r, or for a group the sum of its ranks
    h       (n, n) fp32; above the diagonal it may hold anything
    right   (n, k) fp32

A program keeps TILE rows i of the product in registers and walks along tiles j of H. Where j > i it reads tile (j, i)
and turns it: element (a, b) of H is stored at (max(a, b), min(a, b)). So every tile off the diagonal is asked for
twice, by programs i and j, and the walk is such that both ask in the same step: in step t, program i is at
j = t - i mod the number of tiles. (Four rows of tiles; the numbers are steps.)

           j   0  1  2  3
        i = 0  0  1  2  3      Tile (3, 1) and tile (1, 3) are the same memory, and both are used in step 0. Once read
        i = 1  1  2  3  0      from memory it is in L2 for the other: one pass over one triangle. It costs no partial
        i = 2  2  3  0  1      products for the transposed half, which would be as large as the triangle when k is 2
        i = 3  3  0  1  2      TILE, and no atomics: the same bits every run.

Few tiles make few programs, so the walk is split among several, whose partial products torch adds in a fixed order;
step t falls to the same split in all of them.

Bytes per element of the triangle: 4 from memory, 8 from L2, and 8 k / TILE of P from L2. FLOPs per element: 4 k.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quailora.kernels.precision import PRECISIONS, dot
from quailora.kernels.variants import Variant

# As in error_products.py, though of half the size: two fit a multiprocessor, and partners in a step must run together.
_PROGRAMS = 256


@triton.jit
def _gram_product_kernel(
    h_ptr,
    right_ptr,
    partial_ptr,
    n,
    k,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[split], (splits, n, k): what the split's share of the steps adds up to. WIDTH columns to a program."""
    i = tl.program_id(0)
    split = tl.program_id(1)
    tiles = tl.num_programs(0)
    columns = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    within = tl.arange(0, TILE)
    rows = i * TILE + within
    sum = tl.zeros((TILE, WIDTH), tl.float32)
    for step in range(split, tiles, tl.num_programs(1)):
        j = (step + tiles - i) % tiles
        top = tl.maximum(i, j) * TILE + within
        left = tl.minimum(i, j) * TILE + within
        h_ptrs = h_ptr + top.to(tl.int64)[:, None] * n + left[None, :]
        tile = tl.load(h_ptrs, mask=(top < n)[:, None] & (left < n)[None, :], other=0.0)
        inner = j * TILE + within
        # On the diagonal this takes either half from the lower triangle; elsewhere the whole tile, as it is or turned.
        h = tl.where(rows[:, None] >= inner[None, :], tile, tl.trans(tile))
        right_ptrs = right_ptr + inner.to(tl.int64)[:, None] * k + columns[None, :]
        right = tl.load(right_ptrs, mask=(inner < n)[:, None] & (columns < k)[None, :], other=0.0)
        sum = dot(h, right, sum, PRECISION)
    partial_ptrs = partial_ptr + (split * n + rows).to(tl.int64)[:, None] * k + columns[None, :]
    tl.store(partial_ptrs, sum, mask=(rows < n)[:, None] & (columns < k)[None, :])


def gram_product(h: Tensor, right: Tensor, *, precision: str = "ieee") -> Tensor:
    """H P: symmetric (n, n) fp32, of which the lower triangle is read, times (n, k) fp32 -> (n, k) fp32."""
    return grouped_gram_product(h, [right], precision=precision)[0]


def grouped_gram_product(h: Tensor, rights: Sequence[Tensor], *, precision: str = "ieee") -> list[Tensor]:
    """[H P₀, H P₁, ...] in one pass over H: each P (n, r) fp32, with ranks of their own."""
    right = torch.cat(list(rights), dim=1) if len(rights) > 1 else rights[0].contiguous()
    n, k = right.shape
    constants = _constants(n, k, precision)
    tiles, chunks = triton.cdiv(n, constants["TILE"]), triton.cdiv(k, constants["WIDTH"])
    split = min(triton.cdiv(_PROGRAMS, tiles), tiles)
    partial = torch.empty(split, n, k, dtype=torch.float32, device=h.device)
    _gram_product_kernel[(tiles, split, chunks)](
        h.contiguous(), right, partial, n, k, **constants, **_resources(constants)
    )
    # Linear by linear, so that each product is contiguous.
    return [part.sum(dim=0) for part in partial.split([each.shape[1] for each in rights], dim=2)]


def _constants(n: int, k: int, precision: str) -> dict[str, Any]:
    """The compile-time arguments."""
    assert precision in PRECISIONS, precision
    # Tiles as wide as registers allow; bf16x3 holds its factors twice, and an n that is not
    # aligned takes a pointer to every element. At most 128 columns at a time: with 256, two
    # stages of P alone take more shared memory than an RTX 4090 has (99 KiB).
    tile = 32 if precision == "bf16x3" or n % 16 else 64
    return {"TILE": tile, "WIDTH": min(128, max(16, triton.next_power_of_2(k))), "PRECISION": precision}


def _resources(constants: dict[str, Any]) -> dict[str, int]:
    # From 64 columns on 4 warps would have to spill registers; a third stage of 128 columns does not fit 99 KiB.
    return {"num_warps": 4 if constants["WIDTH"] == 16 else 8, "num_stages": 2}


def variants() -> Iterator[Variant]:
    for width, precision, even in product((16, 64, 128), PRECISIONS, (True, False)):
        constants = _constants(4096 if even else 4095, width, precision)
        yield Variant(
            name=f"k{width}-{precision}{'' if even else '-ragged'}",
            kernel=_gram_product_kernel,
            signature={"h_ptr": "*fp32", "right_ptr": "*fp32", "partial_ptr": "*fp32", "n": "i32", "k": "i32"},
            constexprs=constants,
            attrs=("h_ptr", "right_ptr", "partial_ptr", *(("n", "k") if even else ())),
            **_resources(constants),
            uses_tensor_cores=precision != "ieee",
            grid=lambda call: (triton.cdiv(call["n"], call["TILE"]), 2, triton.cdiv(call["k"], call["WIDTH"])),
            uses_wide_loads=even,
        )
