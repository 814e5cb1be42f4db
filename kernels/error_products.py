"""E P and Eᵀ A, E = W - Q, straight from the weight W and the packed Q: E is never in memory.

Equivalent to
    error_product(weight, codes, right)     (weight.float() - Q.float()) @ right       (m, n) (n, r) -> (m, r)
    error_product_t(weight, codes, left)    (weight.float() - Q.float()).T @ left      (n, m) (m, r) -> (n, r)
with Q the values of the forward pass, rounded to its compute dtype.

    m, n, r    outputs, inputs, rank; any, r up to 256
    b          elements that share one absmax in a 4-bit weight: b in a row along the flat, row-major order
    weight     (m, n) bf16, fp16 or fp32, row-major
    codes      4 bits: (ceil(m n / 2),) uint8, high nibble first.  LLM.int8: (m, n) int8
    absmax     4 bits: (ceil(m n / b),) fp32.  LLM.int8: (m,) fp32
    right      (n, r) fp32;  left (m, r) fp32

One kernel makes both products, of up to three linears that share their input. A program keeps a tile of KEPT rows of
the product in registers and walks along the other side of E, INNER at a time:

          E P                                  Eᵀ A
             n ->                                 n ->
        +----------------+                   +----------------+
      m |                |                 m |     |  |       |     -> E tile by tile, and beside it
        |[ ]->           |  x (n, r)         |     v          |        the rows of P or A that it meets
        |                |                   |                |
        +----------------+                   +----------------+

4096 rows in tiles of 128 are 32 programs, too few for a GPU, so the walk is split among several. Each writes a partial
product of its own and torch adds them in a fixed order: the same bits every run, which atomics would not give.

Bytes per element of E, from bf16 and b = 64: W 2, codes 0.5, absmax 0.06. FLOPs per element: 2 r.
P is read once for every tile of KEPT rows: 4 r / KEPT bytes more per element of E, from L2.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quailora.kernels.precision import PRECISIONS, dot
from quailora.kernels.variants import Variant

# The linears of one launch: q, k and v share an input, gate and up do. (MLA and others have no more.)
_GROUP = 3

# Programs to split the work into at least, if it can be: as many as an H100 has multiprocessors (132), nearly; an
# A100 (108) runs two at a time on each. It is not asked of the device, so that a split, and its rounding, is the same
# everywhere. More programs would cost more partial products than they gain.
_PROGRAMS = 128


@dataclass(frozen=True, eq=False)
class Codes:
    """A packed Q as the kernel reads it: every absmax in fp32."""

    codes: Tensor
    absmax: Tensor
    blocksize: int | None = None  # b; None for LLM.int8
    dtype: torch.dtype = torch.float32  # Q is rounded to it
    table: Tensor | None = None  # (256,) int64: byte -> the two fp32 values it stands for; None for LLM.int8

    @classmethod
    def of(cls, quantized: Any) -> "Codes":
        """From a weight of `quantized.py`, FourBit or EightBit, whose codes it shares. Nested absmax is decoded."""
        if quantized.codes.dtype == torch.int8:
            return cls(quantized.codes, quantized.absmax)
        absmax = quantized.absmax if isinstance(quantized.absmax, Tensor) else quantized.absmax.dequantize()
        # What every byte stands for, asked of the weight itself: so the values are those of the forward pass.
        device, blocks = quantized.codes.device, -(-512 // quantized.blocksize)
        every_byte = replace(
            quantized,
            codes=torch.arange(256, dtype=torch.uint8, device=device),
            absmax=torch.ones(blocks, device=device),
            shape=(1, 512),
            dtype=torch.float32,
        )
        table = every_byte.dequantize().view(256, 2).view(torch.int64).view(256)
        return cls(quantized.codes, absmax, quantized.blocksize, quantized.dtype, table)


@triton.jit
def _select(index, first, second, third):
    return tl.where(index == 0, first, tl.where(index == 1, second, third))


@triton.jit
def _load(ptrs, mask, EVEN: tl.constexpr):
    if EVEN:  # no tile reaches over an edge: a sixth fewer instructions in the loop
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0)


@triton.jit
def _error_tile(
    weight_ptr,
    codes_ptr,
    absmax_ptr,
    table,
    rows,
    column,
    m,
    n,
    pairs_per_row,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GRANULE: tl.constexpr,
    PAIRED: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """E at `rows` and the COLUMNS columns from `column` on: fp32, 0 beyond m and n."""
    ROWS: tl.constexpr = rows.shape[0]
    columns = column + tl.arange(0, COLUMNS)
    row_starts = rows.to(tl.int64) * n  # m n may exceed 2³¹
    there = rows < m
    inside = there[:, None] & (columns < n)[None, :]
    weight = _load(weight_ptr + row_starts[:, None] + columns[None, :], inside, EVEN).to(tl.float32)
    if BITS == 0:  # E itself, dense
        return weight
    elif BITS == 8:
        codes = _load(codes_ptr + row_starts[:, None] + columns[None, :], inside, EVEN).to(tl.float32)
        absmax = _load(absmax_ptr + rows, there, EVEN)
        return weight - codes * absmax[:, None] * (1 / 127)  # in the order of bitsandbytes: the same bits
    else:
        if PAIRED:  # a row begins with a whole byte: one look-up for two elements
            pairs = column // 2 + tl.arange(0, COLUMNS // 2)
            byte_ptrs = codes_ptr + (rows.to(tl.int64) * pairs_per_row)[:, None] + pairs[None, :]
            bytes = _load(byte_ptrs, there[:, None] & (pairs < pairs_per_row)[None, :], EVEN)
            high, low = _look_up(table, bytes)
            values = tl.reshape(tl.join(high, low), (ROWS, COLUMNS))
        else:
            elements = row_starts[:, None] + columns[None, :]
            bytes = _load(codes_ptr + elements // 2, inside, EVEN)
            high, low = _look_up(table, bytes)
            values = tl.where(elements % 2 == 0, high, low)
        # GRANULE divides n and b, so granules never straddle a block, though blocks may straddle rows.
        granules = column + tl.arange(0, COLUMNS // GRANULE) * GRANULE
        blocks = (row_starts[:, None] + granules[None, :]) // BLOCKSIZE
        absmax = _load(absmax_ptr + blocks, there[:, None] & (granules < n)[None, :], EVEN)
        q = tl.reshape(values, (ROWS, COLUMNS // GRANULE, GRANULE)) * absmax[:, :, None]
        return weight - tl.reshape(q, (ROWS, COLUMNS)).to(Q_DTYPE).to(tl.float32)


@triton.jit
def _look_up(table, bytes):
    """What the high and the low nibble of each byte stand for, fp32."""
    pairs = tl.reshape(tl.gather(table, tl.reshape(bytes.to(tl.int32), (bytes.numel,)), 0), bytes.shape)
    high = (pairs & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    low = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return high, low


@triton.jit
def _error_product_kernel(
    weight_0,
    weight_1,
    weight_2,
    codes_0,
    codes_1,
    codes_2,
    absmax_0,
    absmax_1,
    absmax_2,
    thin_0,
    thin_1,
    thin_2,
    m_0,
    m_1,
    m_2,
    r_0,
    r_1,
    r_2,
    table_ptr,
    partial_ptr,
    n,
    pairs_per_row,
    TRANSPOSED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GRANULE: tl.constexpr,
    PAIRED: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    KEPT: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """partial[split] = the part of E P, or of Eᵀ A, that the split's share of the walk adds up to, for all linears.

    thin: P (n, r), or A (m, r), of each linear. partial: (splits, Σ kept r), kept = m for E P and n for Eᵀ A.
    A linear that is not there has m = 0 and r = 0. RANK: the largest r, padded to a power of two.
    EVEN: of every linear, KEPT and INNER divide m and n, and r is RANK.
    """
    if TRANSPOSED:
        tiles_0 = tl.cdiv(n, KEPT)
        tiles_1 = tl.cdiv(n, KEPT)
    else:
        tiles_0 = tl.cdiv(m_0, KEPT)
        tiles_1 = tl.cdiv(m_1, KEPT)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    linear = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
    tile -= _select(linear, 0, tiles_0, tiles_0 + tiles_1)

    weight_ptr = _select(linear, weight_0, weight_1, weight_2)
    thin_ptr = _select(linear, thin_0, thin_1, thin_2)
    m = _select(linear, m_0, m_1, m_2)
    r = _select(linear, r_0, r_1, r_2)
    if BITS == 0:
        codes_ptr = weight_ptr
        absmax_ptr = weight_ptr
    else:
        codes_ptr = _select(linear, codes_0, codes_1, codes_2)
        absmax_ptr = _select(linear, absmax_0, absmax_1, absmax_2)
    table = tl.load(table_ptr + tl.arange(0, 256)) if BITS == 4 else 0

    if TRANSPOSED:
        kept_size, inner_size = n, m
        size_0, size_1, size_2 = n * r_0, n * r_1, n * r_2
    else:
        kept_size, inner_size = m, n
        size_0, size_1, size_2 = m_0 * r_0, m_1 * r_1, m_2 * r_2

    kept = tile * KEPT + tl.arange(0, KEPT)
    ranks = tl.arange(0, RANK)
    sum = tl.zeros((KEPT, RANK), tl.float32)
    for start in range(split * INNER, inner_size, tl.num_programs(1) * INNER):
        inner = start + tl.arange(0, INNER)
        # Not read beyond its end, where a NaN may be: 0 in E would not silence it.
        thin_mask = (inner < inner_size)[:, None] & (ranks < r)[None, :]
        thin = _load(thin_ptr + inner.to(tl.int64)[:, None] * r + ranks[None, :], thin_mask, EVEN)
        if TRANSPOSED:
            error = _error_tile(
                weight_ptr, codes_ptr, absmax_ptr, table, inner, tile * KEPT, m, n, pairs_per_row,
                BITS, BLOCKSIZE, GRANULE, PAIRED, Q_DTYPE, EVEN, KEPT,
            )  # fmt: skip
            error = tl.trans(error)
        else:
            error = _error_tile(
                weight_ptr, codes_ptr, absmax_ptr, table, kept, start, m, n, pairs_per_row,
                BITS, BLOCKSIZE, GRANULE, PAIRED, Q_DTYPE, EVEN, INNER,
            )  # fmt: skip
        sum = dot(error, thin, sum, PRECISION)

    before = split.to(tl.int64) * (size_0 + size_1 + size_2) + _select(linear, 0, size_0, size_0 + size_1)
    partial_ptrs = partial_ptr + before + kept.to(tl.int64)[:, None] * r + ranks[None, :]
    tl.store(partial_ptrs, sum, mask=(kept < kept_size)[:, None] & (ranks < r)[None, :])


def error_product(weight: Tensor, codes: Codes | None, right: Tensor, *, precision: str = "tf32") -> Tensor:
    """E P: (m, n) times (n, r) fp32 -> (m, r) fp32. Without codes, `weight` is E itself."""
    return grouped_error_product([(weight, codes)], [right], precision=precision)[0]


def error_product_t(weight: Tensor, codes: Codes | None, left: Tensor, *, precision: str = "tf32") -> Tensor:
    """Eᵀ A: the transpose of (m, n) times (m, r) fp32 -> (n, r) fp32. Without codes, `weight` is E itself."""
    return grouped_error_product_t([(weight, codes)], [left], precision=precision)[0]


def grouped_error_product(
    errors: Sequence[tuple[Tensor, Codes | None]], rights: Sequence[Tensor], *, precision: str = "tf32"
) -> list[Tensor]:
    """[E₀ P₀, E₁ P₁, ...] of linears that share their input (n alike): each E as (weight, codes), each P (n, r) fp32.

    m and r may differ from linear to linear; the kind of quantisation and the dtypes may not. The products are views
    of one buffer.
    """
    return _in_groups(errors, rights, False, precision)


def grouped_error_product_t(
    errors: Sequence[tuple[Tensor, Codes | None]], lefts: Sequence[Tensor], *, precision: str = "tf32"
) -> list[Tensor]:
    """[E₀ᵀ A₀, E₁ᵀ A₁, ...], as `grouped_error_product`: each A (m, r) fp32."""
    return _in_groups(errors, lefts, True, precision)


def _in_groups(
    errors: Sequence[tuple[Tensor, Codes | None]], thins: Sequence[Tensor], transposed: bool, precision: str
) -> list[Tensor]:
    products: list[Tensor] = []
    for start in range(0, len(errors), _GROUP):
        group = slice(start, start + _GROUP)
        products += _launch(errors[group], thins[group], transposed, precision)
    return products


def _launch(
    errors: Sequence[tuple[Tensor, Codes | None]], thins: Sequence[Tensor], transposed: bool, precision: str
) -> list[Tensor]:
    weights = [weight.contiguous() for weight, _ in errors]
    thins = [thin.contiguous() for thin in thins]
    heights, n = [weight.shape[0] for weight in weights], weights[0].shape[1]
    ranks = [thin.shape[1] for thin in thins]
    kept = [n] * len(errors) if transposed else heights
    constants = _constants(errors[0][1], n, max(ranks), transposed, precision)
    inner = heights if transposed else [n]
    even = all(size % constants["KEPT"] == 0 for size in kept) and all(size % constants["INNER"] == 0 for size in inner)
    tiles = sum(triton.cdiv(size, constants["KEPT"]) for size in kept)
    steps = triton.cdiv(max(inner), constants["INNER"])
    split = min(triton.cdiv(_PROGRAMS, tiles), steps)
    sizes = [size * rank for size, rank in zip(kept, ranks, strict=True)]
    partial = torch.empty(split, sum(sizes), dtype=torch.float32, device=weights[0].device)
    packed = [(weight, weight) if codes is None else (codes.codes, codes.absmax) for weight, codes in errors]
    table = errors[0][1].table if errors[0][1] is not None else None
    _error_product_kernel[(tiles, split)](
        *_padded(weights, weights[0]),
        *_padded([codes for codes, _ in packed], packed[0][0]),
        *_padded([absmax for _, absmax in packed], packed[0][1]),
        *_padded(thins, thins[0]),
        *_padded(heights, 0),
        *_padded(ranks, 0),
        table if table is not None else partial,  # not read unless there are 4-bit codes
        partial,
        n,
        n // 2,
        EVEN=even and all(rank == constants["RANK"] for rank in ranks),
        **constants,
        **_resources(constants, weights[0].element_size()),
    )
    total = partial.sum(dim=0) if split > 1 else partial[0]
    return [flat.view(size, rank) for flat, size, rank in zip(total.split(sizes), kept, ranks, strict=True)]


def _padded(values: Sequence[Any], filling: Any) -> list[Any]:
    return [*values, *[filling] * (_GROUP - len(values))]


_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _constants(codes: Codes | None, n: int, rank: int, transposed: bool, precision: str) -> dict[str, Any]:
    """The compile-time arguments but for EVEN."""
    assert precision in PRECISIONS, precision
    padded = max(16, triton.next_power_of_2(rank))  # the tensor cores take no less than 16
    # 128 × 64 of E: few re-reads of P, and with 8 warps the product and a step's factors fit the registers. bf16x3
    # holds its factors twice, and ieee all that a step multiplies, at once: they take less.
    kept = 64 if precision == "ieee" or padded > (64 if precision == "bf16x3" else 128) else 128
    inner = {"ieee": min(64, 4096 // padded), "bf16x3": 32, "tf32": 64 if transposed else 32}.get(precision, 64)
    bits = 0 if codes is None else 8 if codes.blocksize is None else 4
    blocksize = codes.blocksize if codes is not None and codes.blocksize is not None else 1
    if bits == 4 and n % 16:  # an absmax and a pointer for every few elements: more registers
        kept, inner = 64, max(16, inner // 2)
    columns = kept if transposed else inner
    return {
        "TRANSPOSED": transposed,
        "BITS": bits,
        "BLOCKSIZE": blocksize,
        "GRANULE": min(blocksize, columns, n & -n),  # the greatest common divisor: all but n are powers of two
        "PAIRED": n % 2 == 0,
        "Q_DTYPE": _TRITON_DTYPES[codes.dtype] if codes is not None else tl.float32,
        "PRECISION": precision,
        "RANK": padded,
        "KEPT": kept,
        "INNER": inner,
    }


def _resources(constants: Mapping[str, Any], weight_bytes: int) -> dict[str, int]:
    # As many stages as fit the 99 KiB of shared memory that sm_86, sm_89 and sm_120 have.
    small = constants["PRECISION"] == "bf16" and constants["RANK"] <= 64 and weight_bytes <= 2
    return {"num_warps": 8, "num_stages": 3 if small and constants["KEPT"] == 128 else 2}


def variants() -> Iterator[Variant]:
    """Every setting of an NF4 weight in bf16; for other kinds, dtypes and ragged shapes those of rank 64."""
    for rank, precision, transposed in product((16, 64, 128, 256), PRECISIONS, (False, True)):
        yield _variant("nf4", "bf16", rank, precision, transposed)
    for precision, transposed in product(PRECISIONS, (False, True)):
        yield _variant("nf4", "bf16", 64, precision, transposed, n=4095)
    kinds = [("nf4", "fp16"), ("nf4", "fp32"), ("int8", "bf16"), ("dense", "bf16")]
    for (kind, dtype), precision, transposed in product(kinds, ("tf32", "bf16"), (False, True)):
        yield _variant(kind, dtype, 64, precision, transposed)


def _variant(kind: str, dtype: str, rank: int, precision: str, transposed: bool, n: int = 4096) -> Variant:
    rounding = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    nothing = torch.empty(0)
    codes = {"nf4": Codes(nothing, nothing, 64, rounding), "int8": Codes(nothing, nothing), "dense": None}[kind]
    constants = _constants(codes, n, rank, transposed, precision)
    constants["EVEN"] = even = n % 64 == 0
    types = {
        "weight": f"*{dtype}",
        "codes": {"nf4": "*u8", "int8": "*i8", "dense": f"*{dtype}"}[kind],
        "absmax": f"*{dtype}" if kind == "dense" else "*fp32",
        "thin": "*fp32",
        "m": "i32",
        "r": "i32",
    }
    pointers = ["table_ptr", "partial_ptr", *(f"{name}_{i}" for name in list(types)[:4] for i in range(_GROUP))]
    sizes = ["n", "pairs_per_row", *(f"{name}_{i}" for name in ("m", "r") for i in range(_GROUP))]

    def grid(call: Mapping[str, Any]) -> tuple[int, int]:
        kept = [call["n"] if transposed and call[f"r_{i}"] else call[f"m_{i}"] for i in range(_GROUP)]
        return sum(triton.cdiv(size, call["KEPT"]) for size in kept), 2

    shape = "t" if transposed else "n"
    return Variant(
        name=f"{kind}-{dtype}-r{rank}-{precision}-{shape}{'' if even else '-ragged'}",
        kernel=_error_product_kernel,
        signature={f"{name}_{i}": kind_of for name, kind_of in types.items() for i in range(_GROUP)}
        | {"table_ptr": "*i64", "partial_ptr": "*fp32", "n": "i32", "pairs_per_row": "i32"},
        constexprs=constants,
        attrs=(*pointers, *(sizes if even else ())),
        **_resources(constants, rounding.itemsize),
        uses_tensor_cores=precision != "ieee",
        grid=grid,
        uses_wide_loads=even,
    )
