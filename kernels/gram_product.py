"""H P for a symmetric H, read from its lower triangle only, for all linears that share the input H belongs to.

Equivalent to
    gram_product(h, right)              (h.tril() + h.tril(-1).T) @ right        (n, n) (n, k) -> (n, k)
    grouped_gram_product(h, rights)     [gram_product(h, right) for right in rights], in one launch

    n       inputs of the linears
    k       columns of P: r, or for a group the sum of its ranks
    h       (n, n) fp32; above the diagonal it may hold anything
    right   (n, k) fp32

A program keeps TILE rows i of the product in registers and loops over tiles j of H. If j > i it reads tile (j, i) and
transposes it: element (a, b) of H is stored at (max(a, b), min(a, b)). So every tile off the diagonal is read
twice, by programs i and j, and the order is such that both read it in the same step: in step t, program i is at
j = t - i mod the number of tiles. (Four rows of tiles; the numbers are steps.)

           j   0  1  2  3
        i = 0  0  1  2  3      Tile (3, 1) and tile (1, 3) are the same memory, and both are used in step 0. Once read
        i = 1  1  2  3  0      from memory it is in L2 for the other, while both programs run: one pass over one
        i = 2  2  3  0  1      triangle. It costs no partial products for the transposed half, which would be as large
        i = 3  3  0  1  2      as the triangle when k is 2 TILE, and no atomics: the same bits every run.

How close it comes to one pass depends on L2. With an LRU cache of an A100's or H100's size, tiles of 32 and programs
in the order of their launch, a simulation reads 1.0 triangles from memory at n = 4096, 1.26 at 8192 with k = 128 and
1.47 at 11008, where a row of programs is longer than what runs at a time.

Few tiles make few programs, so the loop is split among several, whose partial products torch adds in a fixed order;
step t falls to the same split in all of them. More than WIDTH columns take several programs, which come right after one
another and so find the tile in L2 as well.

Bytes per element of the triangle: 4 from memory, or that much more, 8 from L2 for every WIDTH columns, and 8 k / TILE
of P from L2. FLOPs per element: 4 k.
"""

from collections.abc import Iterator, Sequence
from functools import partial as bind
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from quailora.kernels.padding import padded, round_up
from quailora.kernels.precision import PRECISIONS, dot
from quailora.kernels.settings import FP_FUSION, Problem, Setting, chosen, target_of
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
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    i = tl.program_id(1)
    tiles = tl.num_programs(1)
    split = tl.program_id(2)
    within = tl.arange(0, TILE)
    rows = i * TILE + within
    sum = tl.zeros((TILE, WIDTH), tl.float32)
    for step in range(split, tiles, tl.num_programs(2)):
        j = (step + tiles - i) % tiles
        top = tl.maximum(i, j) * TILE + within
        left = tl.minimum(i, j) * TILE + within
        h_ptrs = h_ptr + top.to(tl.int64)[:, None] * n + left[None, :]
        tile = tl.load(h_ptrs, mask=(top < n)[:, None] & (left < n)[None, :], other=0.0)
        inner = j * TILE + within
        # On the diagonal both halves come from the lower triangle; elsewhere the whole tile, as stored or transposed.
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
    right = torch.cat(list(rights), dim=1) if len(rights) > 1 else rights[0]
    k = right.shape[1]
    right = padded(right, round_up(k)).contiguous()
    partials = _launch(h.contiguous(), right, precision)[:, :, :k]
    # Linear by linear, so that each product is contiguous.
    return [part.sum(dim=0) for part in partials.split([each.shape[1] for each in rights], dim=2)]


def _launch(h: Tensor, right: Tensor, precision: str, setting: Setting | None = None) -> Tensor:
    """The partial products, (splits, n, k)."""
    n, k = right.shape
    width = min(128, max(16, triton.next_power_of_2(k)))
    if setting is None:
        setting = chosen(_problem(n, width, precision), _settings(target_of(h.device), n, width, precision), h.device)
    chunks, tiles, split = _grid(n, k, setting["TILE"], width)
    partials = torch.empty(split, n, k, dtype=torch.float32, device=h.device)
    _gram_product_kernel[(chunks, tiles, split)](
        h, right, partials, n, k, WIDTH=width, PRECISION=precision, **setting, enable_fp_fusion=FP_FUSION
    )
    return partials


def _grid(n: int, k: int, tile: int, width: int) -> tuple[int, int, int]:
    """Chunks of the columns, rows of tiles, and how many programs share the loop over each."""
    tiles = triton.cdiv(n, tile)
    return triton.cdiv(k, width), tiles, min(triton.cdiv(_PROGRAMS, tiles), tiles)


_SIZES = (4096, 14336)  # inputs of linears in models of 7 to 8 billion parameters


def _problem(n: int, width: int, precision: str) -> str:
    return f"gram_product-k{width}-{precision}{'' if n % 16 == 0 else '-ragged'}"


def _settings(target: str, n: int, width: int, precision: str) -> list[Setting]:
    """The default; and, for the most common cases, others that may be faster."""
    assert precision in PRECISIONS, precision
    nvidia = target.startswith("sm_")
    # Tiles as wide as registers allow; bf16x3 holds its factors twice, ieee all that a step multiplies at once, and an
    # n that is not aligned takes a pointer to every element. A wave of AMD's has twice the threads: small tiles would
    # leave them with copies of each other.
    large = precision == "bf16x3" or (precision == "ieee" and width == 128) or n % 16
    tile = 32 if nvidia and large else 64
    # From 32 columns on 4 warps would have to spill registers.
    warps = 4 if width == 16 else 8
    # Left alone, ptxas would rather spill a little than give a thread more than 64 registers for a small tile, or more
    # than 128 for one of 128 columns.
    limit = {"maxnreg": 255} if nvidia and (tile == 32 or width == 128) else {}
    settings = [{"TILE": tile, "num_warps": warps, "num_stages": 2, **limit}]
    if precision == "bf16x3" and n % 16 == 0 and width >= 64:  # what the solvers ask for, of one linear or of three
        if nvidia:
            # Two tiles loading while one is multiplied; or half the re-reads of P, where the registers take it.
            settings.append({"TILE": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 255})
            if width == 128 or target == "sm_90":
                settings.append({"TILE": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 255})
        else:  # none, for more blocks at a time
            settings.append({"TILE": 64, "num_warps": 8, "num_stages": 1})
    return settings


def problems(device: torch.device) -> Iterator[Problem]:
    """The cases to time, on a synthetic H (its values do not matter)."""
    for n, width in product(_SIZES, (64, 128)):
        h, right = torch.randn(n, n, device=device), torch.randn(n, width, device=device)
        yield Problem(
            _problem(n, width, "bf16x3"),
            _settings(target_of(device), n, width, "bf16x3"),
            bind(_launch, h, right, "bf16x3"),
        )


def variants(target: str) -> Iterator[Variant]:
    for width, precision, n in product((16, 32, 64, 128), PRECISIONS, (4096, 4095)):
        for number, setting in enumerate(_settings(target, n, width, precision)):
            yield Variant(
                name=f"{_problem(n, width, precision).removeprefix('gram_product-')}{f'-{number}' if number else ''}",
                kernel=_gram_product_kernel,
                signature={"h_ptr": "*fp32", "right_ptr": "*fp32", "partial_ptr": "*fp32", "n": "i32", "k": "i32"},
                constexprs={"TILE": setting["TILE"], "WIDTH": width, "PRECISION": precision},
                attrs=("h_ptr", "right_ptr", "partial_ptr", "k", *(["n"] if n % 16 == 0 else [])),
                num_warps=setting["num_warps"],
                num_stages=setting["num_stages"],
                maxnreg=setting.get("maxnreg"),
                uses_tensor_cores=precision != "ieee",
                grid=lambda call: _grid(call["n"], call["k"], call["TILE"], call["WIDTH"]),
                uses_wide_loads=n % 16 == 0,
            )
