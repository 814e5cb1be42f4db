"""The Triton kernels of error_products.py: E P or Eᵀ A of up to three linears that share their input, and E itself.

    thin       P (n, RANK) or A (m, RANK) fp32, with columns of zeros up to RANK, which tensor cores take
    partial    (splits, sum of the rows of the products, RANK) fp32
    table      (256,) int64: byte -> the two fp32 values that its nibbles stand for

One kernel computes both products, for up to three linears that share their input. A program keeps a tile of KEPT rows
of the product in registers and loops over the other side of E, INNER at a time:

          E P                                  Eᵀ A
             n ->                                 n ->
        +----------------+                   +----------------+
      m |                |                 m |     |  |       |     -> E tile by tile, and beside it
        |[ ]->           |  x (n, r)         |     v          |        the rows of P or A that it meets
        |                |                   |                |
        +----------------+                   +----------------+

4096 rows in tiles of 256 are 16 programs, too few for a GPU, so the loop is split among several. Each writes its own
partial product, and torch adds them in a fixed order: the same bits in every run, unlike atomics.

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
"""

import triton
import triton.language as tl

from quailora.kernels.precision import dot


@triton.jit
def _select(index, first, second, third):
    return tl.where(index == 0, first, tl.where(index == 1, second, third))


@triton.jit
def _load(ptrs, mask, EVEN: tl.constexpr):
    if EVEN:  # no tile reaches past an edge: a sixth fewer instructions in the loop
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
        if ALIGNMENT > 1:  # a row starts on a whole byte: one look-up for two elements
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
    """The fp32 values of the high and the low nibble of each byte."""
    pairs = tl.reshape(tl.gather(table, tl.reshape(bytes.to(tl.int32), (bytes.numel,)), 0), bytes.shape)
    high = (pairs & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    low = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return high, low


@triton.jit(do_not_specialize=["start", "stop", "units"])
def error_kernel(
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
def error_product_kernel(
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
