"""E P and Eᵀ A, E = W - Q, straight from the weight W and the packed Q, with E never in memory; and E itself.

Equivalent to
    error_product(weight, codes, right)     (weight.float() - Q.float()) @ right       (m, n) (n, r) -> (m, r)
    error_product_t(weight, codes, left)    (weight.float() - Q.float()).T @ left      (n, m) (m, r) -> (n, r)
    error(weight, codes)                     weight.float() - Q.float()                (m, n)
with Q the values of the forward pass, rounded to its compute dtype.

    m, n, r    outputs, inputs, rank; any, r up to 256
    b          elements that share one absmax in a 4-bit weight: b in a row along the flat, row-major order
    weight     (m, n) bf16, fp16 or fp32, row-major
    codes      4 bits: (ceil(m n / 2),) uint8, high nibble first.  LLM.int8: (m, n) int8
    absmax     4 bits: (ceil(m n / b),) fp32.  LLM.int8: (m,) fp32
    right      (n, r) fp32;  left (m, r) fp32; in the kernel with columns of zeros up to RANK, which tensor cores take

One kernel makes both products, of up to three linears that share their input. A program keeps a tile of KEPT rows of
the product in registers and walks along the other side of E, INNER at a time:

          E P                                  Eᵀ A
             n ->                                 n ->
        +----------------+                   +----------------+
      m |                |                 m |     |  |       |     -> E tile by tile, and beside it
        |[ ]->           |  x (n, r)         |     v          |        the rows of P or A that it meets
        |                |                   |                |
        +----------------+                   +----------------+

4096 rows in tiles of 256 are 16 programs, too few for a GPU, so the walk is split among several. Each writes a partial
product of its own and torch adds them in a fixed order: the same bits every run, which atomics would not give.

Bytes per element of E, from bf16 and b = 64: W 2, codes 0.5, absmax 0.06 (0.12 or 0.25 where a step, of 32 or 16, is
shorter than b). P is read once for every tile of KEPT rows: 4 RANK / KEPT more, from L2. The partial products,
written, read and added, are 8 RANK splits / n more. FLOPs per element: 2 RANK. All that is requested of global memory
at 4096 x 4096, in parts of the 2.56 that W and Q are; finer precisions have room for fewer sums, and so read P for
more tiles:

    r                  16      32      64      128     256
    bf16, tf32         1.2     1.4     1.8     3.0     7.8
    bf16x3             1.2     1.4     1.9     4.4     7.8
    ieee               1.3     1.5     2.7     4.4     7.8

A `weight` without codes is E itself, such as the one that `error` has written in bf16 over W: 2 bytes per element.

What a kernel is compiled for is told by its constants alone: that a row of E is `units` times ALIGNMENT elements, for
one. Triton's own habit, to compile anew for sizes that 16 divides, would make more forms than anyone could try.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial as bind
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quailora.kernels.padding import padded
from quailora.kernels.precision import PRECISIONS, dot
from quailora.kernels.settings import FP_FUSION, Problem, Setting, chosen, shared_bytes, target_of
from quailora.kernels.variants import Variant

# The linears of one launch: q, k and v share an input, gate and up do. (MLA and others have no more.)
_GROUP = 3

# Programs to split the work into at least, if it can be: one for each multiprocessor of an H100 (132) or A100 (108),
# nearly. It is not asked of the device, so that a split, and its rounding, is the same on every GPU of a target. More
# programs would cost more partial products than they gain.
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
    units,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    GRANULE: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """E at `rows` and the COLUMNS columns from `column` on: fp32, 0 beyond m and n = units ALIGNMENT."""
    ROWS: tl.constexpr = rows.shape[0]
    n = units * ALIGNMENT
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
        if ALIGNMENT > 1:  # a row begins with a whole byte: one look-up for two elements
            pairs_per_row = units * (ALIGNMENT // 2)
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


@triton.jit(do_not_specialize=["start", "stop", "units"])
def _error_kernel(
    weight_ptr,
    codes_ptr,
    absmax_ptr,
    table_ptr,
    out_ptr,
    start,
    stop,
    units,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    GRANULE: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out, (stop - start, n) = E[start:stop], in its own dtype.

    `out` may be weight[start:stop]: what a program stores depends on the very elements that it overwrites, so they have
    been read; and no other program reads them.
    """
    rows = start + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS
    table = tl.load(table_ptr + tl.arange(0, 256)) if BITS == 4 else 0
    error = _error_tile(
        weight_ptr, codes_ptr, absmax_ptr, table, rows, column, stop, units,
        BITS, BLOCKSIZE, ALIGNMENT, GRANULE, Q_DTYPE, EVEN, COLUMNS,
    )  # fmt: skip
    n = units * ALIGNMENT
    columns = column + tl.arange(0, COLUMNS)
    out_ptrs = out_ptr + (rows - start).to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_ptrs, error.to(out_ptr.dtype.element_ty), mask=(rows < stop)[:, None] & (columns < n)[None, :])


@triton.jit(do_not_specialize=["m_0", "m_1", "m_2", "units"])
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
    table_ptr,
    partial_ptr,
    units,
    TRANSPOSED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    GRANULE: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    KEPT: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """partial[split] = the part of E P, or of Eᵀ A, that the split's share of the walk adds up to, for all linears.

    thin: P (n, RANK), or A (m, RANK), of each linear. partial: (splits, Σ kept, RANK), kept = m for E P and n for Eᵀ A.
    A linear that is not there has m = 0. EVEN: of every linear, KEPT and INNER divide m and n.
    """
    n = units * ALIGNMENT
    if TRANSPOSED:  # the rows of each linear's product
        kept_0, kept_1, kept_2 = n, tl.where(m_1 > 0, n, 0), tl.where(m_2 > 0, n, 0)
    else:
        kept_0, kept_1, kept_2 = m_0, m_1, m_2
    tiles_0 = tl.cdiv(kept_0, KEPT)
    tiles_1 = tl.cdiv(kept_1, KEPT)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    linear = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
    tile -= _select(linear, 0, tiles_0, tiles_0 + tiles_1)

    weight_ptr = _select(linear, weight_0, weight_1, weight_2)
    thin_ptr = _select(linear, thin_0, thin_1, thin_2)
    m = _select(linear, m_0, m_1, m_2)
    if BITS == 0:
        codes_ptr = weight_ptr
        absmax_ptr = weight_ptr
    else:
        codes_ptr = _select(linear, codes_0, codes_1, codes_2)
        absmax_ptr = _select(linear, absmax_0, absmax_1, absmax_2)
    table = tl.load(table_ptr + tl.arange(0, 256)) if BITS == 4 else 0

    if TRANSPOSED:
        kept_size, inner_size = n, m
    else:
        kept_size, inner_size = m, n

    kept = tile * KEPT + tl.arange(0, KEPT)
    ranks = tl.arange(0, RANK)
    sum = tl.zeros((KEPT, RANK), tl.float32)
    for start in range(split * INNER, inner_size, tl.num_programs(1) * INNER):
        inner = start + tl.arange(0, INNER)
        # Not read beyond its end, where a NaN may be: 0 in E would not silence it.
        thin_ptrs = thin_ptr + inner.to(tl.int64)[:, None] * RANK + ranks[None, :]
        thin = _load(thin_ptrs, (inner < inner_size)[:, None], EVEN)
        if TRANSPOSED:
            error = _error_tile(
                weight_ptr, codes_ptr, absmax_ptr, table, inner, tile * KEPT, m, units,
                BITS, BLOCKSIZE, ALIGNMENT, GRANULE, Q_DTYPE, EVEN, KEPT,
            )  # fmt: skip
            error = tl.trans(error)
        else:
            error = _error_tile(
                weight_ptr, codes_ptr, absmax_ptr, table, kept, start, m, units,
                BITS, BLOCKSIZE, ALIGNMENT, GRANULE, Q_DTYPE, EVEN, INNER,
            )  # fmt: skip
        sum = dot(error, thin, sum, PRECISION)

    before = split.to(tl.int64) * (kept_0 + kept_1 + kept_2) + _select(linear, 0, kept_0, kept_0 + kept_1)
    partial_ptrs = partial_ptr + (before + kept)[:, None] * RANK + ranks[None, :]
    tl.store(partial_ptrs, sum, mask=(kept < kept_size)[:, None])


def error(
    weight: Tensor, codes: Codes | None, *, out: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows start..stop of E, (stop - start, n): a new fp32 matrix, or `out` (contiguous), rounded to its dtype.

    `out` may be those rows of `weight` itself, so that E takes the place of W. In bf16 that loses nothing where W and Q
    are bf16 and within a factor of two of each other, or Q is 0: as all elements are of NF4 in blocks with their own
    absmax, and three quarters of FP4. The products then take E as a `weight` without codes.
    """
    m, n = weight.shape
    rows = (m if stop is None else stop) - start
    if out is None:
        out = torch.empty(rows, n, dtype=torch.float32, device=weight.device)
    assert out.is_contiguous() and out.shape == (rows, n), f"expected contiguous ({rows}, {n}), got {tuple(out.shape)}"
    setting = _error_setting(target_of(weight.device))
    constants = _constants(codes, n, setting["COLUMNS"])
    _error_kernel[_error_grid(rows, n)](
        weight.contiguous(), *_packed(weight, codes), _table(codes, weight), out, start, start + rows,
        n // constants["ALIGNMENT"], EVEN=rows % setting["ROWS"] == n % setting["COLUMNS"] == 0,
        **constants, **setting, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out


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

    m and r may differ from linear to linear; the kind of quantization and the dtypes may not. The products are views
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
    errors: Sequence[tuple[Tensor, Codes | None]],
    thins: Sequence[Tensor],
    transposed: bool,
    precision: str,
    setting: Setting | None = None,
) -> list[Tensor]:
    weights = [weight.contiguous() for weight, _ in errors]
    heights, n, device = [weight.shape[0] for weight in weights], weights[0].shape[1], weights[0].device
    ranks = [thin.shape[1] for thin in thins]
    codes = errors[0][1]
    case = _Case.of(weights[0].dtype, codes, heights, n, max(ranks), transposed, precision)
    thins = [padded(thin, case.rank).contiguous() for thin in thins]
    if setting is None:
        setting = chosen(case.problem, case.settings(target_of(device)), device)
    constants = case.constants(codes, setting)
    kept = [n] * len(errors) if transposed else heights
    tiles, split = _grid(setting, kept, heights if transposed else [n])
    partial = torch.empty(split, sum(kept), case.rank, dtype=torch.float32, device=device)
    packed = [_packed(*error) for error in errors]
    _error_product_kernel[(tiles, split)](
        *_filled(weights, weights[0]),
        *_filled([codes for codes, _ in packed], packed[0][0]),
        *_filled([absmax for _, absmax in packed], packed[0][1]),
        *_filled(thins, thins[0]),
        *_filled(heights, 0),
        _table(codes, partial),
        partial,
        n // constants["ALIGNMENT"],
        **constants,
        **setting,
        enable_fp_fusion=FP_FUSION,
    )
    total = partial.sum(dim=0) if split > 1 else partial[0]
    return [product[:, :rank].contiguous() for product, rank in zip(total.split(kept), ranks, strict=True)]


def _filled(values: Sequence[Any], filling: Any) -> list[Any]:
    return [*values, *[filling] * (_GROUP - len(values))]


def _packed(weight: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor]:
    return (weight, weight) if codes is None else (codes.codes, codes.absmax)


def _table(codes: Codes | None, filling: Tensor) -> Tensor:
    return filling if codes is None or codes.table is None else codes.table  # read only where there are 4-bit codes


def _error_grid(rows: int, n: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ERROR_TILE["ROWS"]), triton.cdiv(n, _ERROR_TILE["COLUMNS"])


def _grid(setting: Setting, kept: Sequence[int], inner: Sequence[int]) -> tuple[int, int]:
    """Tiles of the products, and how many programs share the walk of each."""
    tiles = sum(triton.cdiv(size, setting["KEPT"]) for size in kept)
    return tiles, min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(max(inner), setting["INNER"]))


_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _bits(codes: Codes | None) -> int:
    return 0 if codes is None else 8 if codes.blocksize is None else 4


def _alignment(bits: int, n: int) -> int:
    """A power of two that divides n. Blocks of 4-bit codes have 64 elements and more, and half as many bytes; of all
    else, 16 are enough for loads of 16 bytes.
    """
    return next(size for size in ((64, 16, 1) if bits == 4 else (16, 1)) if n % size == 0)


def _constants(codes: Codes | None, n: int, columns: int) -> dict[str, Any]:
    """What `_error_tile` must know of W and Q, for rows of n and tiles of so many columns."""
    blocksize = codes.blocksize if codes is not None and codes.blocksize is not None else 1
    alignment = _alignment(_bits(codes), n)
    return {
        "BITS": _bits(codes),
        "BLOCKSIZE": blocksize,
        "ALIGNMENT": alignment,
        "GRANULE": min(blocksize, columns, alignment),  # the greatest common divisor: all are powers of two
        "Q_DTYPE": _TRITON_DTYPES[codes.dtype] if codes is not None else tl.float32,
    }


# Of the kernel that writes E: so large that the look-up table is less than a tenth of what a program reads and writes.
_ERROR_TILE: Setting = {"ROWS": 16, "COLUMNS": 256}


def _error_setting(target: str) -> Setting:
    """8 elements to a thread, which for W in 16 bits is one load; a pointer for each, where rows are ragged, fits the
    registers that ptxas likes to give. (A warp of AMD has 64 threads.)"""
    return _ERROR_TILE | {"num_warps": 16 if target.startswith("sm_") else 8, "num_stages": 1}


# Sums that a program keeps at most; 8 warps have room for three times as many numbers beside them. bf16x3 holds its
# factors twice, and ieee all that a step multiplies, at once: they keep less.
_SUMS = {"ieee": 64 * 64, "bf16x3": 64 * 128, "tf32": 64 * 256, "bf16": 64 * 256}

_LARGEST_TILE = 256

# No tile reaches over an edge; some do; some do, and 16 divides n, but not 64, which codes of 4 bits are read for; some
# do, and nothing divides n. With an n of each.
_FORMS = {"even": 4096, "masked": 4160, "masked16": 4112, "ragged": 4095}

# The kind of W or E, its dtype, and the one that Q is rounded to -> the precisions in which there are all ranks and
# forms: those that solvers take by themselves, or every one. All else shares a few, so that each that there is can be
# compiled in the tests: ranks are padded further, every tile has masks, and "bf16" is made in tf32.
_COMMON: dict[tuple[str, torch.dtype, torch.dtype], Sequence[str]] = {
    ("4bit", torch.bfloat16, torch.bfloat16): PRECISIONS,
    ("4bit", torch.float16, torch.float16): ("bf16x3", "tf32"),
    ("dense", torch.bfloat16, torch.bfloat16): ("bf16x3", "tf32"),
    ("dense", torch.float16, torch.float16): ("bf16x3", "tf32"),
}


@dataclass(frozen=True)
class _Case:
    """All that the settings of a product depend on, but for the GPU."""

    kind: str  # "4bit", "int8", "dense"
    dtype: torch.dtype  # of W
    compute: torch.dtype  # that a 4-bit Q is rounded to; else that of W
    rank: int  # the largest, padded: what tensor cores take
    precision: str
    transposed: bool
    form: str  # of _FORMS

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        codes: Codes | None,
        heights: Sequence[int],
        n: int,
        rank: int,
        transposed: bool,
        precision: str,
    ) -> "_Case":
        assert precision in PRECISIONS, precision
        bits = _bits(codes)
        kind = {0: "dense", 4: "4bit", 8: "int8"}[bits]
        compute = codes.dtype if codes is not None and bits == 4 else dtype
        alignment, even = _alignment(bits, n), all(size % _LARGEST_TILE == 0 for size in (n, *heights))
        form = (
            "even" if even else "ragged" if alignment == 1 else "masked16" if (bits, alignment) == (4, 16) else "masked"
        )
        return cls(kind, dtype, compute, max(16, triton.next_power_of_2(rank)), precision, transposed, form)._served()

    @classmethod
    def possible(cls) -> "Iterator[_Case]":
        """What `of` may give."""
        types = [("4bit", dtype, compute) for dtype, compute in product(_DTYPES, _DTYPES)]
        types += [(kind, dtype, dtype) for kind, dtype in product(("int8", "dense"), _DTYPES)]
        every = [
            cls(*each, rank, precision, transposed, form)
            for each, rank, precision, transposed, form in product(
                types, (16, 32, 64, 128, 256), PRECISIONS, (False, True), _FORMS
            )
            if each[0] == "4bit" or form != "masked16"
        ]
        yield from dict.fromkeys(case._served() for case in every)

    @property
    def common(self) -> bool:
        return self.precision in _COMMON.get((self.kind, self.dtype, self.compute), ())

    def _served(self) -> "_Case":
        """That which makes this product: itself, or one of those that are shared."""
        case = replace(self, precision="tf32") if self.precision == "bf16" and not self.common else self
        if case.common:
            return case
        form = {"even": "masked", "masked16": "ragged"}.get(case.form, case.form)
        return replace(case, rank=64 if case.rank <= 64 else 256, form=form)

    @property
    def name(self) -> str:
        q = [] if self.compute == self.dtype else ["q", _DTYPES[self.compute]]
        words = [self.kind, _DTYPES[self.dtype], *q, f"r{self.rank}", self.precision, "t" if self.transposed else "n"]
        return "-".join(words if self.form == "even" else [*words, self.form])

    @property
    def problem(self) -> str:
        return f"error_product-{self.name}"

    def settings(self, target: str) -> list[Setting]:
        """The default; and for the commonest case what else may be faster."""
        # As many rows as registers allow, for the fewest re-reads of P; steps as short as tensor cores like them, so
        # that two of them fit the shared memory of every target. Masks take registers too.
        room = _SUMS[self.precision]
        kept = min(128 if self.precision == "ieee" else _LARGEST_TILE, max(64, room // self.rank))
        inner = 32 if kept * self.rank <= room else 16
        frequent = self.form == "even" and self.dtype == torch.bfloat16
        if self.precision == "bf16x3" and self.rank == 64 and frequent:
            # Without masks as many sums as in tf32 fit, though not everywhere beside whole steps.
            kept, inner = _LARGEST_TILE, 32 if target in ("sm_90", "sm_100", "gfx942") else 16
        masked, int8_beside_fp32 = "masked" in self.form, (self.kind, self.dtype) == ("int8", torch.float32)
        if masked and (int8_beside_fp32 or self.precision == "ieee"):  # which leave masks few registers
            kept, inner = 32 if self.rank == 256 else 64 if self.precision == "ieee" else kept, 16
        if masked and self.rank >= (128 if self.precision == "tf32" else 256):
            inner = 16
        if self.precision == "bf16x3" and self.form != "even" and self.kind != "4bit":
            kept, inner = (32 if self.rank == 256 else 64), 16  # fp32 or int8 as it is loaded, beside its two halves
        if self.form == "ragged":  # a pointer for every element and an absmax for every few: more registers
            kept, inner = min(kept, 32 if self.precision == "ieee" and self.rank in (32, 64, 128) else 64), 16
        nvidia = target.startswith("sm_")
        if self.kind == "int8" and not nvidia:  # 16 codes to a load, each unpacked and rounded in software
            kept = min(kept, 128)
        # Left alone, ptxas would rather spill a little than give a thread more than 128 registers (or 64, or 80). Such
        # blocks come one to a multiprocessor anyway, so it may take all 255; but for ieee, whose unrolled loop it would
        # reorder until even those overflow. AMD's compiler does neither.
        limit = {"maxnreg": 255} if nvidia and self.precision != "ieee" else {}
        if self.precision == "ieee" and not self.common:  # what fits whatever W and Q are
            kept, inner, limit = 32, 16, {"maxnreg": 168} if nvidia else {}
        settings = [{"KEPT": kept, "INNER": inner, "num_warps": 8, "num_stages": 2, **limit}]
        if frequent and self.kind == "4bit" and self.precision in ("tf32", "bf16") and kept == _LARGEST_TILE:
            if nvidia:
                half = 64 if shared_bytes(target) > 99 * 1024 else 32
                settings += [
                    # Two steps on their way while one is multiplied.
                    {"KEPT": 256, "INNER": 32, "num_warps": 8, "num_stages": 3, **limit},
                    # Half the sums, so that two blocks share a multiprocessor, if their shared memory fits it too.
                    {"KEPT": 128, "INNER": half, "num_warps": 8, "num_stages": 2},
                ]
            else:
                settings += [
                    # Nothing is on its way while a step is multiplied, but more blocks run at a time.
                    {"KEPT": 256, "INNER": 32, "num_warps": 8, "num_stages": 1},
                    # A fifth fewer instructions, with half as many waves to hide latencies.
                    {"KEPT": 256, "INNER": 32, "num_warps": 4, "num_stages": 2},
                ]
        if self.precision == "bf16x3" and self.rank == 64 and frequent:
            # More, and longer, steps of fewer rows.
            settings.append({"KEPT": 128, "INNER": 32, "num_warps": 8, "num_stages": 2, **limit})
        return settings

    def constants(self, codes: Codes | None, setting: Setting) -> dict[str, Any]:
        """The compile-time arguments but for those of the setting."""
        return {
            "TRANSPOSED": self.transposed,
            "PRECISION": self.precision,
            "RANK": self.rank,
            "EVEN": self.form == "even",
            **_constants(codes, _FORMS[self.form], setting["KEPT" if self.transposed else "INNER"]),
        }


# (m, n) of projections in models of 7 to 8 billion parameters: square, to the MLP, and from it.
_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))


def problems(device: torch.device) -> Iterator[Problem]:
    """What is worth timing, on synthetic weights: their values do not matter. The products of krylov, and those of als,
    which has E itself where it may.
    """
    cases = [
        *product(("4bit",), (16, 64), ("tf32", "bf16"), (False, True)),
        *product(("4bit", "dense"), (64,), ("bf16x3",), (False, True)),
    ]
    for (m, n), (kind, rank, precision, transposed) in product(_SHAPES, cases):
        weight = torch.randn(m, n, dtype=torch.bfloat16, device=device)
        codes = (
            None
            if kind == "dense"
            else Codes(
                torch.randint(256, (m * n // 2,), dtype=torch.uint8, device=device),
                torch.rand(m * n // 64, device=device),
                64,
                torch.bfloat16,
                torch.randn(256, 2, device=device).view(torch.int64).view(256),
            )
        )
        thin = torch.randn(m if transposed else n, rank, device=device)
        case = _Case.of(weight.dtype, codes, [m], n, rank, transposed, precision)
        yield Problem(
            case.problem,
            case.settings(target_of(device)),
            bind(_launch, [(weight, codes)], [thin], transposed, precision),
        )


def variants(target: str) -> Iterator[Variant]:
    """Every setting of every case, and E itself; of 4-bit weights, those in blocks of 64."""
    for case in _Case.possible():
        yield from _product_variants(target, case)
    for kind, dtype, compute in dict.fromkeys((case.kind, case.dtype, case.compute) for case in _Case.possible()):
        for form, out in product(_FORMS, dict.fromkeys((dtype, torch.float32))):
            if kind == "4bit" or (kind == "int8" and form != "masked16"):
                yield _error_variant(target, kind, dtype, form, compute, out)


def _example(kind: str, dtype: torch.dtype) -> Codes | None:
    nothing = torch.empty(0)
    return {"4bit": Codes(nothing, nothing, 64, dtype), "int8": Codes(nothing, nothing), "dense": None}[kind]


def _types(kind: str, dtype: torch.dtype) -> dict[str, str]:
    weight = f"*{_DTYPES[dtype]}"
    codes = {"4bit": "*u8", "int8": "*i8", "dense": weight}[kind]
    return {"weight": weight, "codes": codes, "absmax": weight if kind == "dense" else "*fp32"}


def _product_variants(target: str, case: _Case) -> Iterator[Variant]:
    types = _types(case.kind, case.dtype) | {"thin": "*fp32", "m": "i32"}
    names = {name: [f"{name}_{i}" for i in range(_GROUP)] for name in types}
    pointers = [name for key in types if key != "m" for name in names[key]]

    def grid(call: Mapping[str, Any]) -> tuple[int, int]:
        n, heights = call["units"] * call["ALIGNMENT"], [call[f"m_{i}"] for i in range(_GROUP) if call[f"m_{i}"]]
        return _grid(call, *(([n] * len(heights), heights) if case.transposed else (heights, [n])))

    # The tensor cores of sm_90 take a left factor in tf32 from registers. Where W is one as it is loaded, with no codes
    # to look up and to pair with, it is copied in the pieces that a thread holds: 8 bytes.
    narrow = (target, case.kind, case.precision, case.transposed) == ("sm_90", "dense", "tf32", False)
    for number, setting in enumerate(case.settings(target)):
        constants = case.constants(_example(case.kind, case.compute), setting)
        yield Variant(
            name="-".join([case.name, *([str(number)] if number else [])]),
            kernel=_error_product_kernel,
            signature={name: kind_of for key, kind_of in types.items() for name in names[key]}
            | {"table_ptr": "*i64" if case.kind == "4bit" else "*fp32"}
            | {"partial_ptr": "*fp32", "units": "i32"},
            constexprs=constants | {"KEPT": setting["KEPT"], "INNER": setting["INNER"]},
            attrs=(*pointers, "table_ptr", "partial_ptr"),
            num_warps=setting["num_warps"],
            num_stages=setting["num_stages"],
            maxnreg=setting.get("maxnreg"),
            uses_tensor_cores=case.precision != "ieee",
            grid=grid,
            uses_wide_loads=case.form == "even" and not narrow,
        )


def _error_variant(
    target: str, kind: str, dtype: torch.dtype, form: str, compute: torch.dtype, out: torch.dtype
) -> Variant:
    n, setting = _FORMS[form], _error_setting(target)
    pointers = _types(kind, dtype)
    pointers |= {"table": "*i64" if kind == "4bit" else pointers["weight"], "out": f"*{_DTYPES[out]}"}
    words = ["error", kind, _DTYPES[dtype], *([] if compute == dtype else ["q", _DTYPES[compute]])]
    return Variant(
        name="-".join([*words, *([] if out == dtype else ["to-fp32"]), form]),
        kernel=_error_kernel,
        signature={f"{name}_ptr": of for name, of in pointers.items()}
        | dict.fromkeys(("start", "stop", "units"), "i32"),
        constexprs={"EVEN": form == "even", "ROWS": setting["ROWS"], "COLUMNS": setting["COLUMNS"]}
        | _constants(_example(kind, compute), n, setting["COLUMNS"]),
        attrs=tuple(f"{name}_ptr" for name in pointers),
        num_warps=setting["num_warps"],
        num_stages=setting["num_stages"],
        uses_tensor_cores=False,
        grid=lambda call: _error_grid(call["stop"] - call["start"], call["units"] * call["ALIGNMENT"]),
        uses_wide_loads=form == "even",
    )
