"""Shipped kernels in their compiled form, executed: results, races, and the bytes and instructions that they cost."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quailora.kernels import cholesky, error_product_configs, error_products, gram_product, quantize_columns
from quailora.kernels.error_products import Codes
from quailora.kernels.precision import PRECISIONS
from quailora.kernels.variants import Variant
from quailora.ops import reference
from quailora.ops.reference import Columns
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.gptq import GPTQ
from quailora.quantization.protocol import QuantizedBase, QuantizedWeight
from tests.emulation import ptx
from tests.helpers import aot
from tests.helpers.columns import assert_same, block
from tests.helpers.kernel_changes import slow_unless_changed
from tests.helpers.rounding import assert_product

R = 64  # what the goals are stated for
IDEAL = 2 + 1 / 2 + 4 / 64  # bytes per element of E: W in bf16, two codes a byte, an fp32 absmax for each 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shipped(kernels: object, name: str, target: str = "sm_80") -> Variant:
    return _variants(kernels, target)[name]


@cache
def _variants(kernels: object, target: str) -> dict[str, Variant]:
    return {variant.name: variant for variant in kernels.variants(target)}  # type: ignore[attr-defined]


def linear(m: int, n: int) -> tuple[Tensor, QuantizedWeight]:
    weight = (0.02 * random(m, n)).bfloat16()
    return weight, BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16).quantize(weight)


# ---- E P and Eᵀ A


@dataclass(frozen=True)
class Launch:
    """The arithmetic of a launch of one linear: its programs, and the bytes that they ask for."""

    variant: Variant
    m: int
    n: int
    tiles: int
    splits: int

    @classmethod
    def of(cls, variant: Variant, m: int, n: int) -> "Launch":
        sizes = {"units": n // variant.constexprs["ALIGNMENT"], "m_0": m, "m_1": 0, "m_2": 0}
        return cls(variant, m, n, *variant.grid({**variant.constexprs, **sizes}))

    @property
    def rank(self) -> int:
        return self.variant.constexprs["RANK"]

    @property
    def kept(self) -> int:
        return self.n if self.variant.constexprs["TRANSPOSED"] else self.m

    def bytes_read(self) -> dict[str, int]:
        elements, granule = self.m * self.n, self.variant.constexprs["GRANULE"]
        return {
            "weight_0": 2 * elements,
            "codes_0": elements // 2,
            "absmax_0": 4 * elements // granule,
            "thin_0": self.tiles * (elements // self.kept) * self.rank * 4,  # all of it for each tile
            "table_ptr": self.tiles * self.splits * 256 * 8,
        }

    def bytes_written(self) -> int:
        return self.splits * self.kept * self.rank * 4

    def bytes_per_element(self) -> float:
        """All that is requested of global memory, the sum of the partial products included, which torch makes."""
        summing = self.bytes_written() + self.kept * self.rank * 4
        return (sum(self.bytes_read().values()) + self.bytes_written() + summing) / (self.m * self.n)


def execute(launch: Launch, base: QuantizedBase | None = None) -> ptx.Counters:
    """Run it on the emulator and check its result; without a base, in NF4."""
    variant, m, n = launch.variant, launch.m, launch.n
    weight, quantized = linear(m, n)
    quantized = quantized if base is None else base.quantize(weight)
    error, codes = reference.error(weight, quantized), Codes.of(quantized.packed)  # type: ignore[attr-defined]
    transposed = variant.constexprs["TRANSPOSED"]
    thin = random(m if transposed else n, R, seed=1)
    partial = torch.full((launch.splits, launch.kept * R), torch.nan)
    units = n // variant.constexprs["ALIGNMENT"]
    arguments = {"table_ptr": codes.table, "partial_ptr": partial, "units": units}
    for i in range(3):
        arguments |= {f"weight_{i}": weight, f"codes_{i}": codes.codes, f"absmax_{i}": codes.absmax, f"thin_{i}": thin}
        arguments[f"m_{i}"] = m if i == 0 else 0
    counters = ptx.run(variant, arguments, grid=(launch.tiles, launch.splits))
    product = partial.sum(dim=0).view(launch.kept, R)
    assert_product(product, error.T if transposed else error, thin, variant.constexprs["PRECISION"])
    return counters


@pytest.mark.parametrize(
    ("precision", "shape", "m", "n"),
    [
        ("tf32", "n", 256, 512),
        ("tf32", "t", 512, 256),
        ("bf16x3", "n", 256, 256),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("tf32", "n", 512, 256),
                ("tf32", "t", 256, 512),
                ("bf16x3", "t", 256, 256),
                ("bf16", "n", 256, 256),
                ("bf16", "t", 256, 256),
            )
        ),
    ],
)
def test_bytes_of_an_error_product(precision: str, shape: str, m: int, n: int) -> None:
    """As the launch's arithmetic says; in two shapes, so that the two agree in how they grow."""
    launch = replace(Launch.of(shipped(error_products, f"4bit-bf16-r{R}-{precision}-{shape}"), m, n), splits=2)
    counters = execute(launch)
    assert dict(counters.bytes_read) == launch.bytes_read()
    assert counters.bytes_written == {"partial_ptr": launch.bytes_written()}
    once = {name: counters.bytes_read[name] for name in ("weight_0", "codes_0")}
    assert (
        {name: counters.bytes_touched[name] for name in once} == once == {"weight_0": 2 * m * n, "codes_0": m * n // 2}
    )
    assert counters.bytes_touched["absmax_0"] == m * n // 16


@pytest.mark.parametrize(
    ("bits", "group", "precision", "shape"),
    [(3, 32, "tf32", "t"), pytest.param(2, 128, "bf16x3", "n", marks=slow_unless_changed("error_products"))],
)
def test_bytes_of_an_error_product_of_gptq(bits: int, group: int, precision: str, shape: str) -> None:
    """The same kernel, and the same bytes as NF4 in blocks of as many: half a byte for a code, whatever its bits."""
    m, n, size = 256, 256, min(group, 64)
    variant = aot.in_blocks(shipped(error_products, f"4bit-bf16-r{R}-{precision}-{shape}"), size)
    launch = replace(Launch.of(variant, m, n), splits=2)
    counters = execute(launch, GPTQ(bits, group, symmetric=False))
    assert dict(counters.bytes_read) == launch.bytes_read()
    once = {name: counters.bytes_touched[name] for name in ("weight_0", "codes_0", "absmax_0")}
    assert once == {"weight_0": 2 * m * n, "codes_0": m * n // 2, "absmax_0": 4 * m * n // size}
    assert sum(once.values()) / (m * n) == (IDEAL if size == 64 else IDEAL + 4 / 64)


# By rank, of IDEAL: all that is requested of global memory, most of it P again and again, from L2. What is coarser
# keeps more sums, and so reads P for fewer tiles.
MOST = {16: 1.3, 32: 1.55, 64: 2.0, 128: 3.1, 256: 7.9}
MOST_OF_FINE = {("ieee", 64): 2.75, ("ieee", 128): 4.5, ("bf16x3", 128): 4.5}


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("shape", ["n", "t"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", MOST)
def test_bytes_of_an_error_product_at_4096(rank: int, precision: str, shape: str, target: str) -> None:
    launch = Launch.of(shipped(error_products, f"4bit-bf16-r{rank}-{precision}-{shape}", target), 4096, 4096)
    read, constants = launch.bytes_read(), launch.variant.constexprs
    once = sum(read[name] for name in ("weight_0", "codes_0", "absmax_0")) / 4096**2
    # Steps shorter than a block read its absmax again.
    assert IDEAL <= once <= (1.05 if shape == "t" or constants["INNER"] >= 32 else 1.08) * IDEAL
    assert launch.bytes_per_element() <= MOST_OF_FINE.get((precision, rank), MOST[rank]) * IDEAL
    if rank == 64 and precision in ("tf32", "bf16"):
        assert constants["INNER"] >= 32


@pytest.mark.parametrize("shape", ["n", "t"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_instructions_of_the_dequantization(precision: str, shape: str) -> None:
    """On sm_90, what the loop of a 4-bit weight has more than that of a dense E in bf16, otherwise the same."""
    dtype = torch.bfloat16
    case = partial(error_product_configs.Case, rank=R, precision=precision, transposed=shape == "t", form="even")
    cases = (case(kind, dtype, dtype) for kind in ("4bit", "dense"))
    fused, dense = (next(error_products._product_variants("sm_90", case)) for case in cases)
    assert {name: fused.constexprs[name] for name in ("KEPT", "INNER")} == {
        name: dense.constexprs[name] for name in ("KEPT", "INNER")
    }
    elements = fused.constexprs["KEPT"] * fused.constexprs["INNER"]
    per_element = [
        aot.resources(aot.compile_for(aot.TARGETS["sm_90"], variant)).loop_instructions_per_element(elements)
        for variant in (fused, dense)
    ]
    assert 1 < per_element[0] - per_element[1] <= 9  # a look-up, a multiplication: less than one cannot be


@pytest.mark.parametrize("form", ["even", "masked", "masked16", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_error_may_take_the_place_of_the_weight(dtype: torch.dtype, form: str) -> None:
    """To the bit, and no thread reads what another has overwritten: that would be a race."""
    variant = shipped(error_products, f"error-4bit-{error_product_configs.DTYPES[dtype]}-{form}")
    m, n = {"even": (32, 256), "masked": (20, 320), "masked16": (20, 304), "ragged": (20, 259)}[form]
    weight = (0.02 * random(m, n)).to(dtype)
    quantized = BitsAndBytes("nf4", blocksize=64, compute_dtype=dtype).quantize(weight)
    expected, codes = reference.error(weight, quantized).to(dtype), Codes.of(quantized)
    pointers = {"weight": weight, "codes": codes.codes, "absmax": codes.absmax, "table": codes.table, "out": weight}
    sizes = {"start": 0, "stop": m, "units": n // variant.constexprs["ALIGNMENT"]}
    ptx.run(variant, {f"{name}_ptr": tensor for name, tensor in pointers.items()} | sizes)
    assert torch.equal(weight, expected)


# ---- H P


@pytest.mark.parametrize(
    "precision", ["tf32", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ieee", "bf16x3"))]
)
def test_bytes_of_a_gram_product(precision: str) -> None:
    """Every tile off the diagonal is asked for twice, what lies above the diagonal never; P once for each tile."""
    n, splits = 256, 2
    variant = shipped(gram_product, f"k{R}-{precision}")
    edge = variant.constexprs["TILE"]
    tiles = n // edge
    h, right = random(n, n) + random(n, n).T, random(n, R, seed=1)
    block = torch.arange(n) // edge
    lower = torch.where(block[:, None] >= block[None, :], h, torch.nan)
    partial = torch.full((splits, n, R), torch.nan)
    arguments = {"h_ptr": lower, "right_ptr": right, "partial_ptr": partial, "n": n, "k": R}
    counters = ptx.run(variant, arguments, grid=(1, tiles, splits))
    assert_product(partial.sum(dim=0), h, right, precision)
    triangle = tiles * (tiles + 1) // 2 * edge**2
    assert counters.bytes_touched["h_ptr"] == 4 * triangle
    assert counters.bytes_read == {"h_ptr": 4 * n * n, "right_ptr": tiles * n * R * 4}
    assert counters.bytes_written == {"partial_ptr": splits * n * R * 4}


# ---- Cholesky


def positive_definite(batch: int, r: int) -> Tensor:
    """Of condition 10."""
    vectors = torch.linalg.qr(random(batch, r, r).double()).Q
    systems = (vectors * 10 ** -torch.linspace(0, 1, r, dtype=torch.float64)) @ vectors.mT
    return ((systems + systems.mT) / 2).float()


def factor(systems: Tensor, rewrite: Callable[[str], str] = lambda text: text) -> tuple[Tensor, Tensor, ptx.Counters]:
    """V = L⁻¹, info, and what it took."""
    batch, r, _ = systems.shape
    padded = -(-r // 16) * 16
    inverse, lower = torch.full((2, batch, padded, padded), torch.nan)
    info = torch.full((batch,), -1, dtype=torch.int32)
    arguments = {
        "systems": systems, "lower": lower, "inverse": inverse, "info": info, "least": 0.0, "part": 0.0, "shift": 0.0,
        "refused": torch.nan, "r": r, "padded": padded, "system_stride": r * r, "row_stride": r,
    }  # fmt: skip
    counters = ptx.run(shipped(cholesky, "factor-r16" if r <= 32 else "factor-r64"), arguments, rewrite=rewrite)
    return inverse[:, :r, :r], info, counters


@pytest.mark.parametrize(
    ("r", "batch"), [(16, 2), (33, 1), (64, 1), *(pytest.param(r, 1, marks=pytest.mark.slow) for r in (100, 128, 256))]
)
def test_a_cholesky_factor(r: int, batch: int) -> None:
    systems = positive_definite(batch, r)
    inverse, info, counters = factor(systems)
    expected = torch.linalg.inv(torch.linalg.cholesky(systems.double()))
    assert info.tolist() == [0] * batch
    # As under the interpreter: the condition times some roundings.
    assert (inverse - expected).norm() < 10 * torch.finfo(torch.float32).eps * expected.norm()
    assert counters.bytes_touched["systems"] <= 4 * batch * r * (r + 1) // 2  # the lower triangle


@pytest.mark.parametrize(("r", "minor"), [(16, 4), (33, 21)])
def test_a_minor_that_is_not_positive_is_named(r: int, minor: int) -> None:
    systems = positive_definite(1, r)
    systems[0, minor - 1, minor - 1] = -1
    assert factor(systems)[1].tolist() == [minor]


PRODUCTS = [each.name for each in cholesky.variants("sm_80") if each.name.startswith("product")]
QUICK_PRODUCTS = ("product-plain-new-32", "product-left-transposed-new-16", "product-right-transposed-update-16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK_PRODUCTS else pytest.mark.slow) for name in PRODUCTS]
)
def test_a_product_of_the_solves(name: str) -> None:
    variant = shipped(cholesky, name)
    tile, update = variant.constexprs["TILE"], variant.constexprs["HAS_BASE"]
    splits, k = (1, 96) if update else (2, 192)  # three steps to each program: a pipeline that fills and drains
    left, right, base = random(1, tile, k), random(1, k, tile, seed=1), random(1, tile, tile, seed=2)
    exact = left.double() @ right.double()
    exact = base - exact if update else exact

    def laid_out(x: Tensor, column_stride: str) -> Tensor:
        return x if column_stride in variant.constexprs else x.mT.contiguous().mT

    operands = {
        "left": laid_out(left, "left_column"),
        "right": laid_out(right, "right_column"),
        "base": laid_out(base, "base_column"),
    }
    out = torch.full((1, splits, tile, tile), torch.nan)
    strides = {
        f"{operand}_{axis}": stride
        for operand, tensor in operands.items()
        for axis, stride in zip(("batch", "row", "column"), tensor.stride(), strict=True)
    }
    sizes = {"m": tile, "n": tile, "k": k, "splits": splits, "split": k // splits}
    arguments = operands | {"out": out} | sizes | strides
    ptx.run(variant, {key: value for key, value in arguments.items() if key not in variant.constexprs})
    # Of k products, each of about 1, the sum is near √k and is rounded k times.
    assert (out.sum(dim=1) - exact).abs().max() < 4 * k * 2**-24


# ---- columns


def round_columns(
    name: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    rewrite: Callable[[str], str] = lambda text: text,
    **options: Any,
) -> tuple[Columns, ptx.Counters]:
    """What the variant makes of W, feedback, U and D, all contiguous, and what it took."""
    (m, k), group, bits = tensors[0].shape, options["group"], options["bits"]
    variant, alignment = shipped(quantize_columns, name), 1 if name.endswith("ragged") else 16
    scales, zeros, levels, clips = (options.get(key) for key in ("scales", "zeros", "levels", "clips"))
    found = Columns(
        codes=torch.full((m, k), 255, dtype=torch.uint8),
        scales=torch.full((m, k // group), torch.nan) if scales is None else scales,
        zeros=torch.full((m, k // group), 255, dtype=torch.uint8),
        errors=torch.full((m, k), torch.nan),
    )
    of_zeros = found.zeros if zeros is None else zeros
    arguments = dict(zip(("weight", "feedback", "factor", "importance"), tensors, strict=True)) | {
        "clips": quantize_columns._clips(tuple(clips), 2**bits - 1, torch.device("cpu")) if clips else found.scales,
        "scales": found.scales, "zeros": of_zeros, "levels": found.scales if levels is None else levels,
        "codes": found.codes, "chosen_zeros": found.zeros, "errors": found.errors,
        "m": m, "group": group, "number": len(clips), "last": 2**bits - 1,
    }  # fmt: skip
    arguments |= dict.fromkeys(("k", "weight_units", "feedback_units", "factor_units"), k // alignment)
    for key, tensor in (("scales", found.scales), ("zeros", of_zeros)):
        arguments |= {f"{key}_row": tensor.stride(0), f"{key}_column": tensor.stride(1)}
    return found, ptx.run(variant, arguments, rewrite=rewrite)


def test_bytes_of_columns() -> None:
    """Each program reads its rows once, and for each column j row j of U and column j of W."""
    m, k, group, clips = 8, 64, 32, (1.0, 0.9)
    tensors, options = block(m, k), {"group": group, "bits": 4, "symmetric": True, "clips": clips}
    found, counters = round_columns("symmetric", tensors, **options)
    assert_same(found, reference.quantize_columns(*tensors, **options))
    programs, groups = m // quantize_columns._ROWS, k // group
    assert counters.bytes_read == {
        "weight": 4 * m * k + 4 * m * k,
        "feedback": 4 * m * k,
        "factor": programs * 4 * k * k,
        "importance": programs * 4 * k,
        "clips": programs * groups * 4 * len(clips),
    }
    assert counters.bytes_written == {
        "codes": m * k,
        "errors": 4 * m * k,
        "scales": 4 * m * groups,
        "zeros": m * groups,
    }


@pytest.mark.parametrize(("name", "most"), [("given", 65), ("symmetric", 110)])
def test_instructions_of_columns(name: str, most: int) -> None:
    """Of a warp on sm_90, for each row: for a column; for a clip with either sign."""
    needs = aot.resources(aot.compile_for(aot.TARGETS["sm_90"], shipped(quantize_columns, name, "sm_90")))
    assert sum(needs.loop.values()) / quantize_columns._ROWS <= most


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch: torch's operations, and the kernel that it stands in for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or "empty" in function.name())
        return function(*args, **(kwargs or {}))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.count += 1

        return launch


@pytest.mark.parametrize("given", ["nothing", "scales", "levels"])
def test_two_launches_for_a_block_of_columns(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product with the errors of all columns before, and the rounding; of the first block only the latter."""
    m, n, options = 8, 320, {"group": 32, "bits": 4, "symmetric": False, "clips": (1.0, 0.9)}
    weight, _, factor, importance = block(m, n)
    errors, nothing = torch.empty(m, n), torch.zeros(m, n)
    monkeypatch.setattr(quantize_columns, "quantize_columns_kernel", launches := Launches())
    quantize_columns._clips(options["clips"], 15, weight.device)  # copied to the device once and for all
    with launches:
        for start in range(0, n, 128):
            stop = min(start + 128, n)
            if given != "nothing":
                options["scales"] = nothing[:, : (stop - start) // 32]
            if given == "levels":
                options["levels"] = nothing[0, :16]
            feedback = errors[:, :start] @ factor[:start, start:stop] if start else nothing[:, :stop]
            block_of_u = factor[start:stop, start:stop]
            quantize_columns.quantize_columns(
                weight[:, start:stop], feedback, block_of_u, importance[start:stop], **options
            )
    assert launches.count == 3 + 2
