"""E P and Eᵀ A, kernel against fp64, run by Triton's interpreter."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quailora.kernels import error_product_configs, error_products
from quailora.kernels.error_product_kernels import error_product_kernel
from quailora.kernels.error_products import (
    Codes,
    error_product,
    error_product_t,
    grouped_error_product,
    grouped_error_product_t,
)
from quailora.kernels.precision import PRECISIONS
from quailora.ops import reference
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.bitsandbytes_weights import EightBit, FourBit
from quailora.quantization.gptq import GPTQ, GPTQWeight
from quailora.quantization.protocol import QuantizedWeight
from tests.helpers import interpreter
from tests.helpers.rounding import assert_product

interpreter.install()

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
FORMS = ["nf4", "fp4", "int8", "dense"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(
    m: int, n: int, method: str = "nf4", dtype: torch.dtype = torch.bfloat16, *, double: bool = True,
    blocksize: int = 64, compute: torch.dtype | None = None, seed: int = 0,
) -> tuple[Tensor, QuantizedWeight | None]:  # fmt: skip
    """A weight and its quantized form, rows and columns of all sizes; "dense" has none and is E itself."""
    weight = (0.02 * random(m, n, seed=seed) * torch.exp(random(m, 1, seed=seed + 1))).to(dtype)
    if method == "dense":
        return weight, None
    if method == "int8":
        return weight, BitsAndBytes("int8").quantize(weight)
    record = BitsAndBytes(method, double=double, blocksize=blocksize, compute_dtype=compute or dtype)
    return weight, record.quantize(weight)


def kernel_operand(weight: Tensor, quantized: QuantizedWeight | None) -> tuple[Tensor, Codes | None]:
    return weight, None if quantized is None else Codes.of(quantized.packed)  # type: ignore[attr-defined]


def exact_error(weight: Tensor, quantized: QuantizedWeight | None) -> Tensor:
    return weight.float() if quantized is None else reference.error(weight, quantized)


def check(weight: Tensor, quantized: QuantizedWeight | None, rank: int, precision: str = "ieee") -> None:
    error, operand = exact_error(weight, quantized), kernel_operand(weight, quantized)
    m, n = weight.shape
    right, left = random(n, rank, seed=2), random(m, rank, seed=3)
    served = error_product_configs.Case.of(weight.dtype, operand[1], [m], n, rank, False, precision).precision
    assert_product(error_product(*operand, right, precision=precision), error, right, served)
    assert_product(error_product_t(*operand, left, precision=precision), error.T, left, served)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", FORMS)
def test_every_kind_dtype_and_precision(method: str, dtype: torch.dtype, precision: str) -> None:
    check(*linear(70, 96, method, dtype), rank=8, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", FORMS)
def test_whole_tiles(method: str, precision: str) -> None:  # the form without masks
    check(*linear(256, 256, method), rank=16, precision=precision)


@pytest.mark.parametrize("compute", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_q_is_rounded_to_the_compute_dtype(dtype: torch.dtype, compute: torch.dtype) -> None:
    check(*linear(33, 64, dtype=dtype, compute=compute), rank=4)


@settings(max_examples=12, deadline=None)
@given(
    m=st.integers(1, 150),
    n=st.integers(1, 150),
    rank=st.integers(1, 40),
    method=st.sampled_from(FORMS),
    blocksize=st.sampled_from([32, 64, 256]),
    double=st.booleans(),
)
def test_any_shape(m: int, n: int, rank: int, method: str, blocksize: int, double: bool) -> None:
    check(*linear(m, n, method, blocksize=blocksize, double=double), rank=rank)


@pytest.mark.parametrize(("n", "b"), [(65, 64), (80, 64), (96, 64), (128, 32)])  # of 64, some straddle rows
@pytest.mark.parametrize("product", [error_product, error_product_t])
def test_each_block_has_its_own_absmax(product: Callable[..., Tensor], n: int, b: int) -> None:
    # Every element has the same code, of value 1, and the absmax of block i is i + 1: so Q spells out the blocks.
    m, r = 20, 16
    blocks = -(-m * n // b)
    quantized = FourBit(
        torch.full((-(-m * n // 2),), 0xFF, dtype=torch.uint8),
        torch.arange(1.0, blocks + 1),
        b, "nf4", (m, n), torch.bfloat16,
    )  # fmt: skip
    error = -(torch.arange(m * n) // b + 1.0).view(m, n)
    thin = torch.eye(n)[:, :r] if product is error_product else torch.eye(m)[:, :r]
    expected = error[:, :r] if product is error_product else error[:r].T
    assert torch.equal(
        product(torch.zeros(m, n, dtype=torch.bfloat16), Codes.of(quantized), thin, precision="ieee"), expected
    )


def linear_of_gptq(
    m: int, n: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16,
    compute: torch.dtype = torch.bfloat16, seed: int = 0,
) -> tuple[Tensor, QuantizedWeight]:  # fmt: skip
    weight, _ = linear(m, n, "dense", dtype, seed=seed)
    return weight, GPTQ(bits, group, symmetric, compute).quantize(weight)


GPTQ_FORMS = [  # n, bits, columns to a group (-1: all of a row), symmetric, W, Q
    (128, 3, 64, False, torch.bfloat16, torch.bfloat16),
    (96, 2, 32, False, torch.bfloat16, torch.bfloat16),
    (96, 3, -1, True, torch.float16, torch.float16),
    (128, 4, 128, True, torch.float32, torch.bfloat16),
    (192, 4, -1, True, torch.bfloat16, torch.float16),
    (160, 2, 32, True, torch.float32, torch.float16),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "bits", "group", "symmetric", "dtype", "compute"), GPTQ_FORMS)
def test_codes_of_gptq(
    n: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype, compute: torch.dtype, precision: str
) -> None:
    check(*linear_of_gptq(70, n, bits, group, symmetric, dtype, compute), rank=8, precision=precision)


@pytest.mark.parametrize("group", [64, 32])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_tiles_of_gptq(precision: str, group: int) -> None:  # the form without masks
    check(*linear_of_gptq(256, 256, 3, group, symmetric=False), rank=16, precision=precision)


@pytest.mark.parametrize(("n", "bits", "group", "symmetric", "dtype", "compute"), GPTQ_FORMS)
def test_the_error_of_gptq_is_that_of_the_reference_to_the_bit(
    n: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype, compute: torch.dtype
) -> None:
    weight, quantized = linear_of_gptq(70, n, bits, group, symmetric, dtype, compute)
    expected = reference.error(weight, quantized)
    assert torch.equal(error_products.error(*kernel_operand(weight, quantized)), expected)
    assert torch.equal(error_products.error(*kernel_operand(weight, quantized), start=5, stop=37), expected[5:37])


@pytest.mark.parametrize("group", [32, 64, 96, 192])
@pytest.mark.parametrize("product", [error_product, error_product_t])
def test_each_group_has_its_own_scale_and_zero(product: Callable[..., Tensor], group: int) -> None:
    # Every code is one above its zero, and the scale of group i is i + 1, below 0 where i is odd: so Q spells them out.
    m, n, r = 20, 192, 16
    groups = torch.arange(m * n // group).view(m, -1)
    zeros = (groups % 7).to(torch.uint8)
    scales = (groups + 1.0) * (1 - 2 * (groups % 2))
    codes = zeros.repeat_interleave(group, 1) + 1
    quantized = GPTQWeight(codes, scales.half(), zeros, 3, torch.float16)
    error = -scales.repeat_interleave(group, 1)
    thin = torch.eye(n)[:, :r] if product is error_product else torch.eye(m)[:, :r]
    expected = error[:, :r] if product is error_product else error[:r].T
    operand = kernel_operand(torch.zeros(m, n, dtype=torch.float16), quantized)
    assert torch.equal(product(*operand, thin, precision="ieee"), expected)


def test_linears_of_other_bits_share_a_launch() -> None:
    """The values of a code are those of its 4 bits, whatever the format has."""
    linears = [linear_of_gptq(m, 96, bits, 32, symmetric=bits != 2, seed=m) for m, bits in ((70, 2), (33, 3), (9, 4))]
    lefts = [random(len(weight), 16, seed=len(weight)) for weight, _ in linears]
    products = grouped_error_product_t([kernel_operand(*each) for each in linears], lefts, precision="ieee")
    for each, left, product in zip(linears, lefts, products, strict=True):
        assert_product(product, reference.error(*each).T, left, "ieee")


@pytest.mark.parametrize("n", [64, 63])  # a row begins with a whole byte, and with half of one
def test_the_high_nibble_comes_first(n: int) -> None:
    codes = torch.full((-(-3 * n // 2),), 0xF7, dtype=torch.uint8)  # NF4: 15 is 1.0, 7 is 0.0
    quantized = FourBit(codes, torch.ones(-(-3 * n // 64)), 64, "nf4", (3, n), torch.float32)
    error = error_product(torch.zeros(3, n), Codes.of(quantized), torch.eye(n), precision="ieee")
    assert torch.equal(error, -((torch.arange(3 * n) + 1) % 2).float().view(3, n))


@pytest.mark.parametrize("method", FORMS)
def test_nothing_beyond_the_edges_is_read(method: str) -> None:
    # What lies around the matrices in memory is NaN (or codes of -128 and of 0xFF): one of it read would show.
    def embedded(x: Tensor) -> Tensor:
        filling = float("nan") if x.is_floating_point() else 0xFF if x.dtype == torch.uint8 else -128
        memory = torch.full((x.numel() + 512,), filling, dtype=x.dtype)
        memory[256 : 256 + x.numel()] = x.flatten()
        return memory[256 : 256 + x.numel()].view(x.shape)

    weight, quantized = linear(67, 72, method, double=False)
    error = exact_error(weight, quantized)
    if quantized is not None:
        quantized = replace(quantized, codes=embedded(quantized.codes), absmax=embedded(quantized.absmax))
    right, left = embedded(random(72, 16)), embedded(random(67, 16))
    operand = kernel_operand(embedded(weight), quantized)
    assert_product(error_product(*operand, right, precision="ieee"), error, right, "ieee")
    assert_product(error_product_t(*operand, left, precision="ieee"), error.T, left, "ieee")


@pytest.mark.parametrize("rank", [1, 16, 64, 128, 256])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_rank_has_a_configuration(rank: int, precision: str) -> None:
    check(*linear(40, 96), rank=rank, precision=precision)


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("members", [2, 3, 4])  # 4 take two launches
def test_each_linear_of_a_group_has_its_own_everything(method: str, members: int) -> None:
    sizes = [(130, 8), (32, 20), (1, 1), (64, 16)][:members]
    linears = [linear(m, 96, method, seed=m) for m, _ in sizes]
    operands = [kernel_operand(*each) for each in linears]
    rights = [random(96, rank, seed=rank) for _, rank in sizes]
    lefts = [random(m, rank, seed=rank) for m, rank in sizes]
    products = grouped_error_product(operands, rights, precision="ieee")
    transposed = grouped_error_product_t(operands, lefts, precision="ieee")
    for each, right, left, product, product_t in zip(linears, rights, lefts, products, transposed, strict=True):
        assert_product(product, exact_error(*each), right, "ieee")
        assert_product(product_t, exact_error(*each).T, left, "ieee")


@pytest.mark.parametrize("programs", [1, 9, 128])
def test_the_walk_may_be_split_in_any_way_and_repeats_its_bits(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_product_configs, "_PROGRAMS", programs)
    weight, quantized = linear(200, 320)
    check(weight, quantized, rank=16)
    operand, right = kernel_operand(weight, quantized), random(320, 16)
    assert torch.equal(error_product(*operand, right), error_product(*operand, right))


def test_views_and_other_layouts_are_taken_as_they_are_meant() -> None:
    weight, quantized = linear(48, 64)
    operand, right = kernel_operand(weight, quantized), random(16, 64).T
    assert torch.equal(error_product(*operand, right), error_product(*operand, right.contiguous()))


def ones_in_nf4(m: int, n: int) -> Codes:
    """Of which the last eight bytes, sixteen elements, are Q = 3: code 15 stands for 1."""
    _, of_one = linear(1, 64)
    codes = Codes(torch.empty(m * n // 2, dtype=torch.uint8), torch.empty(m * n // 64), 64, torch.bfloat16)
    codes.codes[-8:], codes.absmax[-1] = 255, 3.0
    return replace(codes, table=Codes.of(of_one).table)


@pytest.mark.parametrize("kind", ["dense", "4bit"])
@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_two_to_the_31(transposed: bool, kind: str) -> None:
    # 2³¹ + 2¹⁷ elements, of which only the last tile is touched: the rest is address space, never memory.
    m, n, r = 2**14 + 1, 2**17, 16
    weight = torch.empty(m, n, dtype=torch.bfloat16)
    weight[-1, -16:] = torch.arange(16.0)
    packed = ones_in_nf4(m, n) if kind == "4bit" else None
    expected = torch.arange(16.0) - (3 if packed else 0)
    case = error_product_configs.Case(kind, torch.bfloat16, torch.bfloat16, r, "ieee", transposed, form="masked")
    [setting] = case.settings("sm_80")
    constants = case.constants(packed, setting)
    kept, inner = (n, m) if transposed else (m, n)
    thin = torch.empty(inner, r)
    if transposed:
        thin[-1] = torch.tensor([1.0] + [0.0] * 15)
    else:
        thin[-16:] = torch.eye(16)
    steps = -(-inner // setting["INNER"])
    partial = torch.empty(steps, kept, r)
    last = (-(-kept // setting["KEPT"]) - 1, steps - 1)
    codes, absmax = error_products._packed(weight, packed)
    of_each = [x for x in (weight, codes, absmax, thin) for _ in range(3)]
    with interpreter.only(*last):
        error_product_kernel[(last[0] + 1, steps)](
            *of_each, m, 0, 0, error_products._table(packed, partial), partial, n // constants["ALIGNMENT"],
            **constants, **setting,
        )  # fmt: skip
    assert torch.equal(partial[-1, -16:, 0] if transposed else partial[-1, -1], expected)


@pytest.mark.parametrize("compute", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("n", [256, 96, 65])  # the form without masks; aligned rows; rows that begin within a byte
def test_the_error_is_that_of_the_reference_to_the_bit(
    n: int, method: str, dtype: torch.dtype, compute: torch.dtype
) -> None:
    weight, quantized = linear(64, n, method, dtype, compute=compute)
    assert torch.equal(error_products.error(*kernel_operand(weight, quantized)), exact_error(weight, quantized))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("method", FORMS)
def test_the_error_may_take_the_place_of_the_weight(method: str, dtype: torch.dtype) -> None:
    weight, quantized = linear(70, 300, method, dtype)
    expected = exact_error(weight, quantized).to(dtype)
    result = error_products.error(*kernel_operand(weight, quantized), out=weight)
    assert result is weight and torch.equal(weight, expected)


def test_of_bf16_the_error_is_bf16_but_for_few_elements() -> None:
    # W and Q within a factor of two of each other: their difference has no more bits than they (Sterbenz's lemma).
    weight, quantized = linear(64, 256)
    exact = exact_error(weight, quantized)
    assert (exact != exact.bfloat16()).float().mean() < 0.02


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 33), (5, 37), (64, 70), (69, None)])
@pytest.mark.parametrize("n", [256, 65])
def test_rows_of_the_error(n: int, start: int, stop: int | None, method: str) -> None:
    weight, quantized = linear(70, n, method)
    expected, untouched = exact_error(weight, quantized), weight.clone()
    rows = error_products.error(*kernel_operand(weight, quantized), start=start, stop=stop)
    assert torch.equal(rows, expected[start:stop])
    error_products.error(*kernel_operand(weight, quantized), out=weight[start:stop], start=start, stop=stop)
    assert torch.equal(weight[start:stop], expected[start:stop].to(weight.dtype))
    others = torch.ones(70, dtype=torch.bool).index_fill(0, torch.arange(70)[start:stop], False)
    assert torch.equal(weight[others], untouched[others])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_of_a_cached_error(dtype: torch.dtype) -> None:
    weight, quantized = linear(70, 96, dtype=dtype)
    error = exact_error(weight, quantized).to(dtype)  # what the cache rounds away is not the product's
    error_products.error(*kernel_operand(weight, quantized), out=weight)
    check(weight, None, rank=16)
    assert_product(error_product(weight, None, random(96, 8), precision="ieee"), error.float(), random(96, 8), "ieee")


@pytest.mark.parametrize("kind", ["int8", "4bit"])
def test_offsets_of_the_error_beyond_two_to_the_31(kind: str) -> None:
    # As above; and in place, so that the last elements are both read and written.
    m, n = 2**14 + 1, 2**17
    weight = torch.empty(m, n, dtype=torch.bfloat16)
    weight[-1, -16:] = 1.0
    if kind == "4bit":
        packed = ones_in_nf4(m, n)
    else:
        packed = Codes(torch.empty(m, n, dtype=torch.int8), torch.full((m,), 3.0))
        packed.codes[-1, -16:] = 127
    last = tuple(size - 1 for size in error_product_configs.error_grid(m, n))
    with interpreter.only(*last):
        error_products.error(weight, packed, out=weight)
    assert (weight[-1, -16:] == -2.0).all()


def test_int8_scales_belong_to_rows() -> None:
    quantized = EightBit(torch.full((5, 7), 127, dtype=torch.int8), torch.arange(1.0, 6.0))
    error = error_product(torch.zeros(5, 7), Codes.of(quantized), torch.eye(7), precision="ieee")
    assert torch.equal(error, -torch.arange(1.0, 6.0)[:, None].expand(5, 7))


@pytest.mark.parametrize(
    ("heights", "n", "form", "dense"),
    [
        ([256, 512], 768, "even", "even"),
        ([256, 500], 768, "masked", "masked"),
        ([256, 512], 832, "masked", "masked"),
        ([256, 512], 784, "masked16", "masked"),
        ([256, 512], 760, "ragged", "ragged"),
    ],
)
def test_masks_are_left_out_of_whole_tiles_only(heights: list[int], n: int, form: str, dense: str) -> None:
    # What a mask that is missing lets in may be multiplied by 0, or not be stored: no product would tell.
    for codes, expected in ((ones_in_nf4(1, 64), form), (None, dense)):
        case = error_product_configs.Case.of(torch.bfloat16, codes, heights, n, 16, False, "tf32")
        assert case.form == expected


@pytest.mark.parametrize(("rows", "n", "even"), [(32, 512, True), (33, 512, False), (32, 500, False)])
def test_masks_are_left_out_of_whole_tiles_of_the_error_only(
    rows: int, n: int, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **constants: launches.append(constants["EVEN"])

    monkeypatch.setattr(error_products, "error_kernel", Kernel())
    error_products.error(torch.zeros(48, n), None, stop=rows)
    assert launches == [even]
