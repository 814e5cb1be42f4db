"""The emulator on hand-written PTX, instruction by instruction and fault by fault, then on a compiled kernel."""

import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quailora.kernels import cholesky, error_product_configs, error_products, gram_product
from quailora.kernels.error_products import Codes
from quailora.kernels.padding import padded
from quailora.kernels.variants import Variant
from quailora.ops import reference
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.gptq import GPTQ
from tests.emulation import ptx
from tests.emulation.ptx.sample import product_variant
from tests.helpers import aot
from tests.helpers.columns import assert_same, block
from tests.helpers.kernel_changes import slow_unless_changed
from tests.helpers.rounding import assert_product
from tests.kernels.test_counts import factor, linear, positive_definite, random, round_columns, shipped


def kernel(body: str, threads: int = 32) -> str:
    """PTX with pointers %rd0 and %rd1, to this thread's word there %rd2 and %rd3, and the thread's number in %r0."""
    return f"""
.version 8.0
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry test(
    .param .u64 .ptr .global .align 1 source,
    .param .u64 .ptr .global .align 1 target
)
.reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %rs<16>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<32>;
    ld.param.b64 %rd0, [source];
    ld.param.b64 %rd1, [target];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd2, %r0, 4, %rd0;
    mad.wide.u32 %rd3, %r0, 4, %rd1;
    mov.b32 %r63, global_smem;
    {body}
    ret;
}}
"""


def execute(
    body: str, source: np.ndarray, target_words: int = 32, *, threads: int = 32, grid: tuple[int, ...] = (1,)
) -> np.ndarray:
    """What the body leaves in `target`, as uint32."""
    target = np.full(target_words, 0xABCDABCD, np.uint32)
    ptx.execute(kernel(body, threads), [source, target], grid, shared_bytes=4096)
    return target


def f32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def f16(value: float) -> int:
    return struct.unpack("<H", struct.pack("<e", value))[0]


NAN, NEGATIVE = 0x7FFFFFFF, lambda value: 2**32 - value

# instruction(s) on %r1, %r2, %r3 with the result in %r9; the three inputs; the result. Worked out by hand from the ISA.
ARITHMETIC = [
    ("add.s32 %r9, %r1, %r2;", (5, NEGATIVE(7), 0), NEGATIVE(2)),
    ("add.u32 %r9, %r1, -1;", (0, 0, 0), 0xFFFFFFFF),
    ("sub.s32 %r9, %r1, %r2;", (5, 7, 0), NEGATIVE(2)),
    ("mul.lo.s32 %r9, %r1, %r2;", (0x10001, 0x10001, 0), 0x20001),
    ("mul.hi.u32 %r9, %r1, %r2;", (0xFFFFFFFF, 2, 0), 1),
    ("mul.hi.s32 %r9, %r1, %r2;", (NEGATIVE(1), 2, 0), NEGATIVE(1)),
    ("mad.lo.s32 %r9, %r1, %r2, %r3;", (3, NEGATIVE(4), 5), NEGATIVE(7)),
    ("mul.wide.s32 %rd9, %r1, %r2; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;", (NEGATIVE(1), 1, 0), 0xFFFFFFFF),
    ("mul.wide.u32 %rd9, %r1, %r2; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;", (0xFFFFFFFF, 2, 0), 1),
    ("div.s32 %r9, %r1, %r2;", (NEGATIVE(7), 2, 0), NEGATIVE(3)),
    ("rem.s32 %r9, %r1, %r2;", (NEGATIVE(7), 2, 0), NEGATIVE(1)),
    ("div.u32 %r9, %r1, %r2;", (NEGATIVE(7), 2, 0), 0x7FFFFFFC),
    ("min.s32 %r9, %r1, %r2;", (NEGATIVE(1), 1, 0), NEGATIVE(1)),
    ("min.u32 %r9, %r1, %r2;", (NEGATIVE(1), 1, 0), 1),
    ("max.s32 %r9, %r1, %r2;", (NEGATIVE(1), 1, 0), 1),
    ("neg.s32 %r9, %r1;", (3, 0, 0), NEGATIVE(3)),
    ("abs.s32 %r9, %r1;", (NEGATIVE(3), 0, 0), 3),
    ("and.b32 %r9, %r1, %r2;", (0b1100, 0b1010, 0), 0b1000),
    ("or.b32 %r9, %r1, %r2;", (0b1100, 0b1010, 0), 0b1110),
    ("xor.b32 %r9, %r1, %r2;", (0b1100, 0b1010, 0), 0b0110),
    ("not.b32 %r9, %r1;", (1, 0, 0), 0xFFFFFFFE),
    ("lop3.b32 %r9, %r1, %r2, %r3, 0xE8;", (0b1100, 0b1010, 0b1001), 0b1000),  # majority
    ("lop3.b32 %r9, %r1, %r2, %r3, 0xB0;", (0b1100, 0b1010, 0b1001), 0b0101 & 0b1100 | 0b1000 & 0b1001),  # a & (~b | c)
    ("shl.b32 %r9, %r1, %r2;", (3, 4, 0), 48),
    ("shl.b32 %r9, %r1, 32;", (3, 0, 0), 0),
    ("shr.u32 %r9, %r1, 1;", (NEGATIVE(8), 0, 0), 0x7FFFFFFC),
    ("shr.s32 %r9, %r1, 1;", (NEGATIVE(8), 0, 0), NEGATIVE(4)),
    ("shr.s32 %r9, %r1, 40;", (NEGATIVE(8), 0, 0), NEGATIVE(1)),
    ("bfe.u32 %r9, %r1, 4, 8;", (0xABC, 0, 0), 0xAB),
    ("bfe.s32 %r9, %r1, 4, 8;", (0xABC, 0, 0), 0xFFFFFFAB),
    ("prmt.b32 %r9, %r1, %r2, 0x7531;", (0x33221100, 0x77665544, 0), 0x77553311),
    ("prmt.b32 %r9, %r1, %r2, 0x0809;", (0x00007F80, 0, 0), 0x80FF8000),  # bit 3: the byte's sign, eight times
    ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};", (0x11112222, 0, 0), 0x22221111),
    ("mov.b64 %rd9, {%r1, %r2}; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;", (1, 2, 0), 2),
    ("cvt.s64.s32 %rd9, %r1; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;", (NEGATIVE(1), 0, 0), 0xFFFFFFFF),
    ("cvt.u64.u32 %rd9, %r1; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;", (NEGATIVE(1), 0, 0), 0),
    ("cvt.s32.s8 %r9, %r1;", (0x80, 0, 0), 0xFFFFFF80),
    ("cvt.u16.u32 %rs1, %r1; cvt.u32.u16 %r9, %rs1;", (0x12345678, 0, 0), 0x5678),
    ("cvt.rn.f32.s32 %r9, %r1;", (NEGATIVE(3), 0, 0), f32(-3)),
    ("cvt.rzi.s32.f32 %r9, %r1;", (f32(-2.75), 0, 0), NEGATIVE(2)),
    ("cvt.rn.f32.u32 %r9, %r1;", (2**24 + 1, 0, 0), f32(2**24)),
    ("cvt.rn.f16.f32 %rs1, %r1; cvt.u32.u16 %r9, %rs1;", (f32(1.5), 0, 0), f16(1.5)),
    ("cvt.u16.u32 %rs1, %r1; cvt.f32.f16 %r9, %rs1;", (f16(-0.125), 0, 0), f32(-0.125)),
    ("cvt.rn.bf16x2.f32 %r9, %r1, %r2;", (f32(1), f32(2), 0), 0x3F804000),  # the first source is the upper half
    ("cvt.rn.bf16x2.f32 %r9, %r1, %r2;", (0x3F808000, 0x3F818000, 0), 0x3F803F82),  # ties go to even
    ("cvt.rn.f16x2.f32 %r9, %r1, %r2;", (f32(1), f32(2), 0), f16(1) << 16 | f16(2)),
    ("cvt.rna.tf32.f32 %r9, %r1;", (0x3F801000, 0, 0), 0x3F802000),  # ties go away from zero
    ("add.f32 %r9, %r1, %r2;", (f32(1), f32(2**-30), 0), f32(1)),
    ("sub.f32 %r9, %r1, %r2;", (f32(1), f32(0.75), 0), f32(0.25)),
    ("mul.f32 %r9, %r1, 0f40000000;", (f32(3), 0, 0), f32(6)),
    ("fma.rn.f32 %r9, %r1, %r1, %r2;", (f32(1 + 2**-12), f32(-1 - 2**-11), 0), f32(2**-24)),  # rounded once
    ("fma.rn.bf16x2 %r9, %r1, %r2, %r3;", (0x40003F80, 0x40404080, 0x3F800000), 0x40E04080),  # 2·3 + 1, 1·4 + 0
    ("add.f16x2 %r9, %r1, %r2;", (f16(1) << 16 | f16(2), f16(3) << 16 | f16(4), 0), f16(4) << 16 | f16(6)),
    ("div.full.f32 %r9, %r1, %r2;", (f32(1), f32(8), 0), f32(0.125)),
    ("sqrt.rn.f32 %r9, %r1;", (f32(2), 0, 0), f32(math.sqrt(2))),
    ("rsqrt.approx.f32 %r9, %r1;", (f32(4), 0, 0), f32(0.5)),
    ("rcp.rn.f32 %r9, %r1;", (f32(4), 0, 0), f32(0.25)),
    ("ex2.approx.f32 %r9, %r1;", (f32(3), 0, 0), f32(8)),
    ("lg2.approx.f32 %r9, %r1;", (f32(8), 0, 0), f32(3)),
    ("abs.f32 %r9, %r1;", (f32(-3), 0, 0), f32(3)),
    ("neg.f32 %r9, %r1;", (f32(3), 0, 0), f32(-3)),
    ("add.ftz.f32 %r9, %r1, %r2;", (1, f32(0), 0), 0),  # the smallest subnormal
    ("add.f32 %r9, %r1, %r2;", (1, f32(0), 0), 1),
    ("min.f32 %r9, %r1, %r2;", (NAN, f32(1), 0), f32(1)),
    ("min.NaN.f32 %r9, %r1, %r2; setp.nan.f32 %p1, %r9, %r9; selp.b32 %r9, 1, 0, %p1;", (NAN, f32(1), 0), 1),
    ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, %r3, 0, %p1;", (NEGATIVE(1), 1, 9), 9),
    ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r9, %r3, 0, %p1;", (NEGATIVE(1), 1, 9), 0),
    ("setp.hi.u32 %p1, %r1, %r2; selp.b32 %r9, %r3, 0, %p1;", (NEGATIVE(1), 1, 9), 9),
    ("setp.ne.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", (NAN, f32(1), 0), 0),
    ("setp.neu.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", (NAN, f32(1), 0), 1),
    ("setp.num.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", (NAN, f32(1), 0), 0),
    ("setp.geu.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", (f32(1), f32(2), 0), 0),
    ("setp.eq.s32 %p1, %r1, 1; not.pred %p2, %p1; @%p2 mov.u32 %r9, 7; @!%p2 mov.u32 %r9, 8;", (1, 0, 0), 8),
    (
        "setp.eq.s32 %p1, %r1, 1; setp.eq.s32 %p2, %r2, 3; and.pred %p1, %p1, %p2; selp.b32 %r9, 5, 6, %p1;",
        (1, 2, 0),
        6,
    ),
    ("{ .reg .b32 low; and.b32 low, %r1, 0xF; add.s32 %r9, low, 1; }", (0xAB, 0, 0), 0xC),  # inline assembly's scope
]


@pytest.mark.parametrize(
    ("instruction", "inputs", "expected"), ARITHMETIC, ids=[f"{row[0]} {row[2]:#x}" for row in ARITHMETIC]
)
def test_arithmetic(instruction: str, inputs: tuple[int, int, int], expected: int) -> None:
    body = f"ld.global.b32 %r1, [%rd0]; ld.global.b32 %r2, [%rd0+4]; ld.global.b32 %r3, [%rd0+8]; {instruction}"
    result = execute(body + "st.global.b32 [%rd3], %r9;", np.array(inputs, np.uint32))
    assert [hex(word) for word in set(result.tolist())] == [hex(expected)]


def test_bfloat16_rounds_as_torch_does() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 32 * 64, np.uint32)
    words[:2] = f32(math.inf), f32(-0.0)
    for lanes in words.reshape(-1, 32):
        body = "ld.global.b32 %r1, [%rd2]; cvt.rn.bf16x2.f32 %r9, %r1, %r1; st.global.b32 [%rd3], %r9;"
        ours = torch.from_numpy(execute(body, lanes).view(np.int16)[::2].copy()).view(torch.bfloat16)
        theirs = torch.from_numpy(lanes.view(np.float32)).bfloat16()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# ---- control


def test_a_loop_that_every_lane_leaves_at_another_turn() -> None:
    body = """
    mov.u32 %r1, 0; mov.u32 %r9, 100;
$again:
    setp.ge.u32 %p1, %r1, %r0;
    @%p1 bra $done;
    add.u32 %r9, %r9, %r1;
    add.u32 %r1, %r1, 1;
    bra.uni $again;
$done:
    shfl.sync.idx.b32 %r10, %r9, 31, 31, -1;
    sub.u32 %r9, %r10, %r9;
    st.global.b32 [%rd3], %r9;"""
    lane = np.arange(32)
    assert (execute(body, np.zeros(1, np.uint32)) == 465 - lane * (lane - 1) // 2).all()  # 465 = 0 + 1 + ... + 30


def test_both_arms_of_a_divergent_branch() -> None:
    body = """
    setp.lt.u32 %p1, %r0, 10;
    @%p1 bra $low;
    mov.u32 %r9, 2;
    bra.uni $join;
$low:
    mov.u32 %r9, 1;
$join:
    st.global.b32 [%rd3], %r9;"""
    assert (execute(body, np.zeros(1, np.uint32)) == np.where(np.arange(32) < 10, 1, 2)).all()


def test_each_block_knows_its_number() -> None:
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x; mad.lo.u32 %r9, %r2, %r3, %r1;
    mad.wide.u32 %rd3, %r9, 4, %rd1;
    setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd3], %r9;"""
    assert execute(body, np.zeros(1, np.uint32), 6, grid=(3, 2)).tolist() == [0, 1, 2, 3, 4, 5]


# ---- shuffles

WIDTH_4 = 0x1C1F  # segments of four lanes: (32 - 4) << 8 | 31


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("bfly.b32 %r9, %r0, 5, 31", lambda lane: lane ^ 5),
        ("idx.b32 %r9, %r0, 7, 31", lambda lane: 7),
        (f"idx.b32 %r9, %r0, 2, {WIDTH_4}", lambda lane: lane // 4 * 4 + 2),
        ("up.b32 %r9, %r0, 3, 0", lambda lane: lane - 3 if lane >= 3 else lane),
        ("down.b32 %r9, %r0, 3, 31", lambda lane: lane + 3 if lane + 3 < 32 else lane),
        (f"down.b32 %r9, %r0, 1, {WIDTH_4}", lambda lane: lane + 1 if lane % 4 < 3 else lane),
        ("down.b32 %r8|%p1, %r0, 3, 31, -1; selp.b32 %r9, 1, 0, %p1; mov.u32 %r8, 0", lambda lane: lane + 3 < 32),
    ],
)
def test_shuffle(mode: str, expected: Callable[[int], int]) -> None:
    members = "" if "-1" in mode else ", -1"
    result = execute(f"shfl.sync.{mode}{members}; st.global.b32 [%rd3], %r9;", np.zeros(1, np.uint32))
    assert result.tolist() == [expected(lane) for lane in range(32)]


def test_a_shuffle_needs_its_whole_warp() -> None:
    body = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.idx.b32 %r9, %r0, 0, 31, -1;"
    with pytest.raises(ptx.Divergence, match="16 of 32 lanes of warp 0"):
        execute(body, np.zeros(1, np.uint32))


# ---- global memory


def test_vectors_and_narrow_types() -> None:
    source = np.arange(16, dtype=np.uint8) + 0x7A
    body = """
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0];
    ld.global.s8 %r5, [%rd0+6];
    ld.global.b8 %rs1, [%rd0+6]; cvt.u32.u16 %r6, %rs1;
    ld.global.v2.b16 {%rs2, %rs3}, [%rd0+4];
    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.global.v2.b32 [%rd1], {%r3, %r5};
    @%p1 st.global.b32 [%rd1+8], %r6;
    @%p1 st.global.b16 [%rd1+12], %rs3;"""
    assert execute(body, source, 4).tolist() == [0x85848382, 0xFFFFFF80, 0x80, 0xABCD8180]


def test_out_of_bounds() -> None:
    body = "ld.global.b32 %r9, [%rd2];"
    execute(body, np.zeros(32, np.uint32))
    with pytest.raises(
        ptx.OutOfBounds, match=r"source: 4 bytes at offset 124, where 124 bytes exist \(1 lanes\)"
    ) as caught:
        execute(body, np.zeros(31, np.uint32))
    assert re.search(r"line \d+: ld\.global\.b32 %r9", caught.value.__notes__[0])
    with pytest.raises(ptx.OutOfBounds, match="source: 4 bytes at offset -4"):
        execute("ld.global.b32 %r9, [%rd0+-4];", np.zeros(31, np.uint32))
    with pytest.raises(ptx.OutOfBounds, match="belongs to no argument"):
        execute("mov.u64 %rd9, 64; st.global.b32 [%rd9], %r0;", np.zeros(1, np.uint32))
    with pytest.raises(ptx.OutOfBounds, match="shared memory"):
        execute("ld.shared.b32 %r9, [%r63+4096];", np.zeros(1, np.uint32))


def test_a_predicate_keeps_lanes_in_bounds() -> None:
    body = "setp.lt.u32 %p1, %r0, 3; mov.u32 %r9, 5; @%p1 ld.global.b32 %r9, [%rd2]; st.global.b32 [%rd3], %r9;"
    assert execute(body, np.zeros(3, np.uint32)).tolist() == [0] * 3 + [5] * 29


def test_misaligned() -> None:
    with pytest.raises(ptx.Misaligned, match="8 bytes at offset 4"):
        execute("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];", np.zeros(32, np.uint32))
    aligned = np.zeros(36, np.uint32)
    shift = next(i for i in range(4) if aligned[i:].ctypes.data % 16 == 8)  # an argument's own alignment counts
    with pytest.raises(ptx.Misaligned, match="16 bytes at offset 0"):
        execute("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0];", aligned[shift:])


def test_memory_and_registers_start_as_nan() -> None:
    result = execute("ld.shared.b32 %r1, [%r63]; st.global.b32 [%rd3], %r1;", np.zeros(1, np.uint32))
    assert np.isnan(result.view(np.float32)).all()
    assert np.isnan(execute("st.global.b32 [%rd3], %r9;", np.zeros(1, np.uint32)).view(np.float32)).all()


def test_bytes_and_instructions_are_counted() -> None:
    body = "ld.global.v2.b32 {%r1, %r2}, [%rd0]; ld.global.b32 %r3, [%rd2]; st.global.b32 [%rd3], %r3;"
    arguments = [np.zeros(64, np.uint32), np.zeros(64, np.uint32)]
    counters = ptx.execute(kernel(body, threads=64), arguments, (1,), 0, ["x", "y"])
    # All lanes of a warp ask for the same 8 bytes, once per warp; then each thread for its own 4.
    assert counters.bytes_read == {"x": 2 * 8 + 64 * 4}
    assert counters.bytes_written == {"y": 64 * 4}
    assert counters.count("ld.global") == 4 and counters.count("") == 2 * (6 + 3 + 1)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ptx.Unsupported, match=r"atom\.global\.add\.u32"):
        execute("atom.global.add.u32 %r9, [%rd1], %r0;", np.zeros(1, np.uint32))


# ---- barriers, deadlocks, races

EXCHANGE = """
    shl.b32 %r1, %r0, 2; add.u32 %r1, %r1, %r63;
    st.shared.b32 [%r1], %r0;
    {barrier}
    xor.b32 %r2, %r0, 32; shl.b32 %r2, %r2, 2; add.u32 %r2, %r2, %r63;
    ld.shared.b32 %r9, [%r2];
    {second_barrier}
    st.shared.b32 [%r1], %r9;
    st.global.b32 [%rd3], %r9;"""


def exchange(barrier: str = "bar.sync 0;", second_barrier: str = "bar.sync 0;") -> np.ndarray:
    """Two warps swap their numbers through shared memory."""
    body = EXCHANGE.format(barrier=barrier, second_barrier=second_barrier)
    return execute(body, np.zeros(1, np.uint32), 64, threads=64)


def test_warps_exchange_through_shared_memory() -> None:
    assert (exchange() == np.arange(64) ^ 32).all()


def test_a_race_is_caught() -> None:
    with pytest.raises(ptx.Race, match="shared memory: read at offset 128, unordered with warp 1"):
        exchange(barrier="")
    with pytest.raises(ptx.Race, match="shared memory: write at offset 0, unordered with warp 1"):  # after a read
        exchange(second_barrier="")
    with pytest.raises(ptx.Race, match="read"):
        exchange(barrier="bar.warp.sync -1;")
    with pytest.raises(ptx.Race, match="write at offset 0"):  # both in one step
        execute("st.shared.b32 [%r63], %r0;", np.zeros(1, np.uint32), threads=64)
    with pytest.raises(ptx.Race, match="several warps"):
        execute("ld.shared.b32 %r1, [%r63]; st.shared.b32 [%r63], %r1;", np.zeros(1, np.uint32), threads=64)


def test_warps_may_write_the_same_value_in_one_instruction() -> None:
    """Not another one, not in another instruction, and nobody may read it yet."""
    same = "and.b32 %r1, %r0, 31; shl.b32 %r2, %r1, 2; add.u32 %r2, %r2, %r63; st.shared.b32 [%r2], %r1;"
    read = "ld.shared.b32 %r9, [%r2]; st.global.b32 [%rd3], %r9;"
    both = execute(f"{same} bar.sync 0; {read}", np.zeros(1, np.uint32), 64, threads=64)
    assert (both == np.arange(64) % 32).all()
    with pytest.raises(ptx.Race, match="shared memory: write at offset 0, unordered with warp 1"):
        execute(same.replace("], %r1", "], %r0"), np.zeros(1, np.uint32), threads=64)
    with pytest.raises(ptx.Race, match="shared memory: write at offset 0, unordered with several warps"):
        execute(f"{same} st.shared.b32 [%r2], %r1;", np.zeros(1, np.uint32), threads=64)
    with pytest.raises(ptx.Race, match="shared memory: read at offset 0, unordered with several warps"):
        execute(same + read, np.zeros(1, np.uint32), 64, threads=64)
    with pytest.raises(ptx.Race, match="write at offset 0"):
        copy = "and.b32 %r1, %r0, 31; shl.b32 %r1, %r1, 2; add.u32 %r1, %r1, %r63;"
        execute(f"{copy} cp.async.ca.shared.global [%r1], [%rd0], 4;", np.zeros(1, np.uint32), threads=64)


def test_a_race_is_caught_though_the_reader_reads_last() -> None:
    """Warp 1 reads, warp 0 reads, warp 0 writes: the last reader is the writer itself, the race is with the other."""
    body = """
    setp.ge.u32 %p1, %r0, 32;
    @%p1 ld.shared.b32 %r1, [%r63];
    @!%p1 ld.shared.b32 %r1, [%r63];
    @!%p1 st.shared.b32 [%r63], %r0;"""
    with pytest.raises(ptx.Race, match="several warps"):
        execute(body, np.zeros(1, np.uint32), threads=64)


def test_races_in_global_memory() -> None:
    write = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd1], %r1;"
    execute(write, np.zeros(1, np.uint32))
    with pytest.raises(ptx.Race, match="target: write at offset 0, unordered with warp 0"):
        execute(write, np.zeros(1, np.uint32), grid=(2,))  # two blocks, whatever barriers each may pass
    read_then_write = """
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 2; ld.global.b32 %r2, [%rd3]; bar.sync 0;
    @%p1 st.global.b32 [%rd3], %r2;"""
    with pytest.raises(ptx.Race, match="target: write at offset 0, unordered with several blocks"):
        execute(read_then_write, np.zeros(1, np.uint32), grid=(3,))


def test_deadlock() -> None:
    with pytest.raises(ptx.Deadlock, match="32 threads wait at a barrier, the other 32 ended"):
        execute("setp.ge.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", np.zeros(1, np.uint32), threads=64)
    with pytest.raises(ptx.Divergence, match=r"10 of 32 lanes of warp 0 meet bar\.sync"):
        execute("setp.lt.u32 %p1, %r0, 10; @%p1 bar.sync 0;", np.zeros(1, np.uint32))


def test_an_endless_loop_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx, "STEP_LIMIT", 100)
    with pytest.raises(ptx.Deadlock, match="still runs after 100 instructions"):
        execute("$here: bra.uni $here;", np.zeros(1, np.uint32))


# ---- cp.async

COPY_TWO_GROUPS = """
    shl.b32 %r1, %r0, 4; add.u32 %r1, %r1, %r63; mad.wide.u32 %rd4, %r0, 16, %rd0;
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd4 + 0 ], 0x10;
    cp.async.commit_group;
    cp.async.cg.shared.global [ %r1 + 1024 ], [ %rd4 + 1024 ], 0x10, {size};
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r9, [%r1+{offset}];
    st.global.b32 [%rd3], %r9;"""


def copy(wait: str, offset: int, size: str = "0x10", words: int = 512) -> np.ndarray:
    body = COPY_TWO_GROUPS.format(wait=wait, offset=offset, size=size)
    return execute(body, np.arange(words, dtype=np.uint32), 64, threads=64)


def test_copies_land_at_their_wait() -> None:
    thread = np.arange(64)
    assert (copy("cp.async.wait_group 1;", offset=0) == 4 * thread).all()
    assert (copy("cp.async.wait_group 0;", offset=1024) == 256 + 4 * thread).all()


def test_a_missing_wait_is_caught() -> None:
    with pytest.raises(ptx.Race, match=r"read at offset 0, where a cp\.async is in flight"):
        copy("", offset=0)
    with pytest.raises(ptx.Race, match=r"read at offset 1024, where a cp\.async is in flight"):
        copy("cp.async.wait_group 1;", offset=1024)


def test_a_copy_is_another_warps_only_after_a_barrier() -> None:
    body = COPY_TWO_GROUPS.format(wait="cp.async.wait_group 0; {barrier} xor.b32 %r1, %r1, 512;", offset=0, size="0x10")
    source = np.arange(512, dtype=np.uint32)
    with_barrier = execute(body.format(barrier="bar.sync 0;"), source, 64, threads=64)
    assert (with_barrier == 4 * (np.arange(64) ^ 32)).all()
    with pytest.raises(ptx.Race, match="unordered with warp 1"):
        execute(body.format(barrier=""), source, 64, threads=64)


def test_a_copy_of_size_zero_fills_with_zeros_and_reads_nothing() -> None:
    assert (copy("cp.async.wait_group 0;", offset=1024, size="0", words=256) == 0).all()
    with pytest.raises(ptx.OutOfBounds):
        copy("cp.async.wait_group 0;", offset=1024, words=256)


# ---- ldmatrix and mma: the layouts of the ISA's figures


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    """Four matrices of which element (i, j) of matrix x is 64 x + 8 i + j."""
    matrices = np.arange(256, dtype=np.uint16)
    trans = ".trans" if transposed else ""
    body = f"""
    shl.b32 %r1, %r0, 4; add.u32 %r1, %r1, %r63; mad.wide.u32 %rd4, %r0, 16, %rd0;
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd4];
    st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r1];
    mad.wide.u32 %rd5, %r0, 16, %rd1;
    st.global.v4.b32 [%rd5], {{%r6, %r7, %r8, %r9}};"""
    pairs = execute(body, matrices, 128).view(np.uint16).reshape(32, 4, 2)  # (lane, matrix, element)
    # Lane 13 is in row 3 of the figure, second pair: elements (3, 2) and (3, 3), or of the transpose (2, 3) and (3, 3).
    assert pairs[13].tolist() == [
        [64 * x + 19, 64 * x + 27] if transposed else [64 * x + 26, 64 * x + 27] for x in range(4)
    ]
    expected = matrices.reshape(4, 8, 8).swapaxes(1, 2) if transposed else matrices.reshape(4, 8, 8)
    assert (pairs.transpose(1, 0, 2).reshape(4, 8, 8) == expected).all()


def a_16_bit(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    return row, lane % 4 * 2 + (i & 1) + (0 if i < 4 else 8)


def b_16_bit(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2


def a_tf32(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2 if i in (0, 2) else (lane >> 2) + 8), lane % 4 + (0 if i in (0, 1) else 4)


def b_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + (0 if i == 0 else 4), lane >> 2


def accumulator(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), lane % 4 * 2 + (i & 1)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma(kind: str) -> None:
    """A product of small whole numbers, exact in every format, dealt to the lanes as the manual's formulas say."""
    a_layout, b_layout, depth = (a_tf32, b_tf32, 8) if kind == "tf32" else (a_16_bit, b_16_bit, 16)
    torch_type = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-8, 9, size, generator=generator) for size in [(16, depth), (depth, 8), (16, 8)])
    fragments = []
    for matrix, layout, elements, dtype in [
        (a, a_layout, depth // 2 if kind != "tf32" else 4, torch_type),
        (b, b_layout, depth // 4, torch_type),
        (c, accumulator, 4, torch.float32),
    ]:
        dealt = torch.stack([torch.stack([matrix[layout(lane, i)] for i in range(elements)]) for lane in range(32)])
        fragments.append(dealt.to(dtype).view(torch.int32))
    words = torch.cat(fragments, dim=1)  # (lane, 4 of A + 2 of B + 4 of C)
    assert words.shape == (32, 10)
    loads = "".join(f"ld.global.b32 %r{1 + i}, [%rd4+{4 * i}];" for i in range(10))
    shape = "m16n8k8" if kind == "tf32" else "m16n8k16"
    body = f"""
    mad.wide.u32 %rd4, %r0, 40, %rd0; {loads}
    mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32
        {{%r20, %r21, %r22, %r23}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}};
    mad.wide.u32 %rd5, %r0, 16, %rd1;
    st.global.v4.b32 [%rd5], {{%r20, %r21, %r22, %r23}};"""
    result = execute(body, words.numpy().copy(), 128).view(np.float32).reshape(32, 4)
    expected = a @ b + c
    assert [[expected[accumulator(lane, i)] for i in range(4)] for lane in range(32)] == result.tolist()


def test_mma_does_not_see_the_low_bits_of_tf32() -> None:
    ones = "mov.b32 %r1, 0f3F801FFF;"  # 1 + 8191 / 2²³: tf32 keeps 10 bits of mantissa
    operands = "{%r1, %r1, %r1, %r1}, {%r1, %r1}, {%r2, %r2, %r2, %r2}"
    body = f"""{ones} mov.b32 %r2, 0f00000000;
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%r9, %r10, %r11, %r12}}, {operands};
    st.global.b32 [%rd3], %r9;"""
    assert (execute(body, np.zeros(1, np.uint32)).view(np.float32) == 8).all()


# ---- a kernel that Triton compiled

# (m, n, k); k and n divisible by 16 as the aligned variant promises, m ragged, k no whole number of blocks
SHAPES = {True: (40, 48, 80), False: (37, 41, 75)}


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("num_warps", "num_stages"), [(1, 1), (4, 3)])
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        ("bf16", "ieee", 1e-6),  # the products are exact, fp32 accumulates: 2⁻²⁴ a step over 80 terms
        ("fp16", "ieee", 1e-6),
        ("fp32", "ieee", 1e-6),
        ("fp32", "tf32", 2e-3),  # 10 bits of mantissa, cut off: up to 2⁻¹⁰ for each factor
    ],
)
def test_a_compiled_product(
    dtype: str, precision: str, tolerance: float, num_warps: int, num_stages: int, aligned: bool
) -> None:
    m, n, k = SHAPES[aligned]
    torch_type = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator).to(torch_type)
    b = torch.randn(k, n, generator=generator).to(torch_type)
    c = torch.full((m, n), torch.nan)
    variant = product_variant(dtype, precision, num_warps, num_stages, aligned=aligned)
    counters = ptx.run(variant, {"a_ptr": a, "b_ptr": b, "c_ptr": c, "m": m, "n": n, "k": k})
    exact = a.double() @ b.double()
    assert (c - exact).norm() < tolerance * exact.norm()
    # 2 × 2 blocks: each half of A and of B is read twice, C is written once.
    assert counters.bytes_read == {"a_ptr": 2 * a.nbytes, "b_ptr": 2 * b.nbytes}
    assert counters.bytes_written == {"c_ptr": c.nbytes}
    mma = 2 * 2 * 3 * (2 * 4 * {"bf16": 2, "fp16": 2, "fp32": 4}[dtype])  # blocks, turns, 16 × 8 tiles, steps of depth
    assert counters.count("mma.") == (0 if (dtype, precision) == ("fp32", "ieee") else mma)


def test_a_false_promise_of_divisibility_is_refused() -> None:
    a, b, c = torch.zeros(32, 72), torch.zeros(72, 32), torch.zeros(32, 32)
    arguments: dict[str, Any] = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "m": 32, "n": 32, "k": 72}
    with pytest.raises(ValueError, match="compiled for k divisible by 16"):
        ptx.run(product_variant("fp32", "tf32"), arguments)
    with pytest.raises(ValueError, match="takes"):
        ptx.run(product_variant("fp32", "tf32"), {"a_ptr": a})


# ---- shipped kernels at the edges: no access beyond them, not even of what a mask or a sum then takes away


def launch_of_a_group(
    variant: Variant, weights: Sequence[Tensor], quantized: Sequence[Any], ranks: Sequence[int]
) -> Callable[[Callable[[str], str]], None]:
    """Runs it with a rewriting of its PTX, in two splits, and compares with fp64."""
    kind, transposed, count = variant.signature["codes_0"], variant.constexprs["TRANSPOSED"], len(weights)
    n, heights, splits = weights[0].shape[1], [len(weight) for weight in weights], 2
    dense = [w.float() if q is None else reference.error(w, q) for w, q in zip(weights, quantized, strict=True)]
    lefts = [error.T if transposed else error for error in dense]
    rank = variant.constexprs["RANK"]
    thins = [padded(random(left.shape[1], r, seed=r), rank) for left, r in zip(lefts, ranks, strict=True)]
    packed = [None if q is None else Codes.of(q.packed) for q in quantized]
    arguments: dict[str, Any] = {"units": n // variant.constexprs["ALIGNMENT"]}
    for i in range(3):
        j = i if i < count else 0
        codes, absmax = (weights[j], weights[j]) if packed[j] is None else (packed[j].codes, packed[j].absmax)
        arguments |= {f"weight_{i}": weights[j], f"codes_{i}": codes, f"absmax_{i}": absmax, f"thin_{i}": thins[j]}
        arguments[f"m_{i}"] = heights[i] if i < count else 0
    kept = [len(left) for left in lefts]
    tiles = sum(-(-len(left) // variant.constexprs["KEPT"]) for left in lefts)

    def launch(rewrite: Callable[[str], str] = lambda text: text) -> None:
        partial = torch.full((splits, sum(kept), rank), torch.nan)
        table = packed[0].table if kind == "*u8" else partial
        ptx.run(variant, arguments | {"partial_ptr": partial, "table_ptr": table}, (tiles, splits), rewrite)
        products = partial.sum(dim=0).split(kept)
        for product, left, thin in zip(products, lefts, thins, strict=True):
            assert_product(product, left, thin, variant.constexprs["PRECISION"])

    return launch


@pytest.mark.parametrize("shape", ["n", "t"])
@pytest.mark.parametrize(("form", "n"), [("masked", 192), ("masked16", 112), ("ragged", 75)])
@pytest.mark.parametrize("precision", ["tf32", "bf16x3"])
def test_error_products_keep_within_the_edges(precision: str, form: str, n: int, shape: str) -> None:
    variant = shipped(error_products, f"4bit-bf16-r16-{precision}-{shape}-{form}")
    weight, quantized = linear(37, n)
    launch_of_a_group(variant, [weight], [quantized], [5])()


B, H, F = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("kind", "dtype", "precision", "transposed", "form", "members"),
    [
        ("4bit", B, "bf16x3", False, "masked", 3),
        ("4bit", B, "bf16x3", True, "ragged", 3),
        ("4bit", B, "tf32", True, "masked16", 2),
        ("int8", B, "tf32", True, "masked", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("4bit", B, "tf32", False, "even", 2),
                ("4bit", B, "ieee", False, "ragged", 2),
                ("4bit", H, "tf32", True, "ragged", 2),
                ("4bit", F, "tf32", False, "ragged", 2),
                ("int8", B, "tf32", False, "ragged", 2),
                ("dense", B, "bf16x3", True, "masked", 1),
                ("dense", B, "bf16x3", False, "ragged", 2),
            ]
        ),
    ],
    ids=lambda value: str(value),
)
def test_a_group_of_linears(
    kind: str, dtype: torch.dtype, precision: str, transposed: bool, form: str, members: int
) -> None:
    """Of every kind, no two alike in height and rank."""
    case = error_product_configs.Case(kind, dtype, dtype, 16, precision, transposed, form).served()
    variant = next(error_products._product_variants("sm_80", case))
    n = {"even": 256, "masked": 192, "masked16": 112, "ragged": 75}[form]
    heights, ranks = (256, 512) if form == "even" else (37, 70, 20), (5, 16, 9)
    how = (
        BitsAndBytes("int8") if kind == "int8" else BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=dtype)
    )
    weights = [(0.02 * random(m, n, seed=m)).to(dtype) for m in heights[:members]]
    quantized = [None if kind == "dense" else how.quantize(weight) for weight in weights]
    launch_of_a_group(variant, weights, quantized, ranks[:members])()


@pytest.mark.parametrize(
    ("dtype", "precision", "transposed", "form"),
    [
        pytest.param(*case, marks=slow_unless_changed("error_products"))
        for case in [
            (B, "bf16x3", True, "masked"),
            (B, "tf32", False, "masked16"),
            (H, "tf32", True, "even"),
            (F, "tf32", False, "masked"),
        ]
    ],
    ids=lambda value: str(value),
)
def test_a_group_of_gptq(dtype: torch.dtype, precision: str, transposed: bool, form: str) -> None:
    """Of other bits and grids, no two alike in height and rank."""
    compute = B if dtype == F else dtype
    case = error_product_configs.Case("4bit", dtype, compute, 16, precision, transposed, form).served()
    variant = aot.in_blocks(next(error_products._product_variants("sm_80", case)), 32)
    n = {"even": 256, "masked": 192, "masked16": 96}[form]
    heights, ranks = (256, 512) if form == "even" else (37, 70, 20), (5, 16, 9)
    bases = [GPTQ(3, 32, False, compute), GPTQ(4, 32, True, compute), GPTQ(2, 32, False, compute)]
    weights = [(0.02 * random(m, n, seed=m)).to(dtype) for m in heights]
    quantized = [base.quantize(weight) for base, weight in zip(bases, weights, strict=False)]
    launch_of_a_group(variant, weights, quantized, ranks[: len(weights)])()


def launch_of_a_gram_product(variant: Variant, n: int, k: int) -> Callable[[Callable[[str], str]], None]:
    """As `launch_of_a_group`."""
    tiles = -(-n // variant.constexprs["TILE"])
    h, right = random(n, n) + random(n, n).T, random(n, k, seed=1)
    lower = torch.where(torch.ones(n, n).tril().bool(), h, torch.nan)

    def launch(rewrite: Callable[[str], str] = lambda text: text) -> None:
        partial = torch.full((2, n, k), torch.nan)
        arguments = {"h_ptr": lower, "right_ptr": right, "partial_ptr": partial, "n": n, "k": k}
        ptx.run(variant, arguments, (1, tiles, 2), rewrite)
        assert_product(partial.sum(dim=0), h, right, variant.constexprs["PRECISION"])

    return launch


@pytest.mark.parametrize("n", [80, 75])
@pytest.mark.parametrize("precision", ["tf32", "bf16x3"])
def test_a_gram_product_keeps_within_the_edges(precision: str, n: int) -> None:
    name = f"k32-{precision}" if n % 16 == 0 else f"k32-{precision}-ragged"
    launch_of_a_gram_product(shipped(gram_product, name), n, 16)()


def test_a_product_of_the_solves_keeps_within_the_edges() -> None:
    m, n, k, split = 48, 48, 80, 64  # a tile and a half; two steps and a half
    left, right, out = random(1, m, k), random(1, k, n, seed=1), torch.full((1, 2, m, n), torch.nan)
    strides = {"left": (m * k, k), "right": (k * n, n), "base": (m * n, n)}
    arguments = {"left": left, "right": right, "base": out, "out": out, "m": m, "n": n, "k": k}
    arguments |= {"splits": 2, "split": split}
    arguments |= {
        f"{name}_{axis}": s for name, of in strides.items() for axis, s in zip(("batch", "row"), of, strict=True)
    }
    ptx.run(shipped(cholesky, "product-plain-new-32"), arguments)
    assert_product(out[0].sum(dim=0), left[0], right[0], "ieee")


def test_each_system_has_scratch_of_its_own() -> None:
    """Which programs that run one after the other would not miss; here, to share it is a race."""
    systems = positive_definite(2, 20)
    inverse, info, _ = factor(systems)
    expected = torch.linalg.inv(torch.linalg.cholesky(systems.double()))
    assert info.tolist() == [0, 0]
    assert (inverse - expected).norm() < 10 * torch.finfo(torch.float32).eps * expected.norm()  # the condition


COLUMNS = {  # a form of the kernel -> how many columns, their groups and bits, and what is given
    "symmetric": (64, 32, 4, ["clips"]),
    "levels-16-ragged": (26, 13, 4, ["scales", "levels"]),
    "symmetric-ragged": (39, 13, 3, ["clips"]),
    "asymmetric": (64, 64, 3, ["clips"]),
    "asymmetric-ragged": (37, 37, 8, ["clips"]),
    "given": (128, 64, 2, ["scales"]),
    "given-ragged": (50, 25, 4, ["scales"]),
    "given-zeros": (64, 32, 8, ["scales", "zeros"]),
    "given-zeros-ragged": (33, 11, 4, ["scales", "zeros"]),
    "levels-16": (64, 32, 4, ["scales", "levels"]),
    "levels-256": (32, 32, 8, ["scales", "levels"]),
    "levels-256-ragged": (30, 30, 7, ["scales", "levels"]),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless_changed("quantize_columns") if number > 1 else [])
        for number, name in enumerate(COLUMNS)
    ],
)
def test_columns_are_those_of_the_reference_to_the_bit(name: str) -> None:
    """One program is whole and one has a single row; memory ends with the arrays. No sum is near enough to another here
    that its order would choose another scale."""
    (k, group, bits, given), m = COLUMNS[name], 5
    tensors, groups = block(m, k), k // group
    values: dict[str, Any] = {
        "clips": (1.0, 0.85),
        "scales": 0.3 * random(m, 3 * groups)[:, 1::3] / 2**bits,
        "zeros": (torch.arange(m * 3 * groups) % 2**bits).to(torch.uint8).view(m, -1)[:, 1::3],
        "levels": torch.linspace(-1, 1, 2**bits) ** 3 * 2**bits / 6,
    }
    options: dict[str, Any] = {"group": group, "bits": bits, "symmetric": name.startswith("symmetric"), "clips": ()}
    options |= {key: values[key] for key in given}
    assert_same(round_columns(name, tensors, **options)[0], reference.quantize_columns(*tensors, **options))
