"""Every shipped configuration of every kernel, compiled for each GPU, fits it and is as it promises."""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

import quailora.kernels
from quailora.kernels import error_product_configs, error_products
from quailora.kernels.precision import PRECISIONS
from quailora.kernels.variants import Variant
from tests.emulation.ptx.sample import product_variant
from tests.helpers import aot
from tests.helpers.kernel_changes import slow_unless_changed

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

QUICK_TARGETS = ("sm_80", "sm_90", "gfx942")  # one for each kind of tensor core


def shipped(target: str) -> Iterator[tuple[str, Variant]]:
    for module in pkgutil.iter_modules(quailora.kernels.__path__):
        kernels = importlib.import_module(f"quailora.kernels.{module.name}")
        if hasattr(kernels, "variants"):
            for variant in kernels.variants(target):
                yield f"{module.name}-{variant.name}", variant


# One of each kernel and kind of GPU; all of them take an hour on two cores.
QUICK = {
    ("sm_80", "error_products-4bit-bf16-r64-tf32-n"),
    ("sm_90", "error_products-4bit-bf16-r64-bf16x3-t"),
    ("gfx942", "error_products-4bit-bf16-r64-tf32-t"),
    ("sm_80", "error_products-error-4bit-bf16-even"),
    ("sm_90", "gram_product-k64-bf16x3"),
    ("gfx942", "gram_product-k64-ieee"),
    ("sm_80", "cholesky-factor-r64"),
    ("sm_90", "cholesky-product-plain-new-32"),
    ("sm_80", "quantize_columns-symmetric"),
    ("gfx942", "quantize_columns-levels-16"),
}

# `variants` lists blocks of 64; GPTQ has groups of 32 too, as bitsandbytes may. These are what solvers use by default.
SMALL_BLOCKS = [
    *(f"4bit-bf16-r64-{precision}-{shape}" for precision in ("tf32", "bf16x3") for shape in ("t", "n")),
    *(f"4bit-bf16-r64-{precision}-{shape}-masked" for precision in ("tf32", "bf16x3") for shape in ("t", "n")),
    "error-4bit-bf16-even",
]

CASES = [
    pytest.param(
        target,
        variant,
        id=f"{name}-{target.name}",
        marks=[] if (target.name, name) in QUICK else slow_unless_changed(name.partition("-")[0]),
    )
    for target in aot.TARGETS.values()
    for name, variant in shipped(target.name)
]


@pytest.mark.parametrize(("target", "variant"), CASES)
def test_a_shipped_configuration_fits_its_target(target: aot.Target, variant: Variant) -> None:
    assert aot.faults(target, variant) == []


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(name, marks=[] if name == "sm_80" else slow_unless_changed("error_products"))
        for name in QUICK_TARGETS
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if number == 0 else slow_unless_changed("error_products"))
        for number, name in enumerate(SMALL_BLOCKS)
    ],
)
def test_blocks_of_32_fit_too(name: str, target: str) -> None:
    [variant] = [variant for variant in error_products.variants(target) if variant.name == name]
    assert aot.faults(aot.TARGETS[target], aot.in_blocks(variant, 32)) == []


def test_every_argument_of_a_variant_is_named_once() -> None:
    for name, variant in shipped("sm_80"):
        assert sorted([*variant.signature, *variant.constexprs]) == sorted(variant.kernel.arg_names), name
        assert set(variant.attrs) <= set(variant.signature), name


@given(
    kind=st.sampled_from(["4bit", "int8", "dense"]),
    dtype=st.sampled_from(FLOATS),
    compute=st.sampled_from(FLOATS),
    heights=st.lists(st.one_of(st.integers(1, 600), st.just(512)), min_size=1, max_size=3),
    n=st.one_of(st.integers(1, 600), st.integers(1, 40).map(lambda units: 16 * units)),
    rank=st.integers(1, 256),
    transposed=st.booleans(),
    precision=st.sampled_from(PRECISIONS),
)
def test_every_product_with_e_is_a_shipped_one(
    kind: str, dtype: torch.dtype, compute: torch.dtype, heights: list[int], n: int, rank: int, transposed: bool,
    precision: str,
) -> None:  # fmt: skip
    codes = error_products._example(kind, compute)
    case = error_product_configs.Case.of(dtype, codes, heights, n, rank, transposed, precision)
    assert case in set(error_product_configs.Case.possible())
    assert case.rank >= rank and PRECISIONS.index(case.precision) <= PRECISIONS.index(precision)  # the finest is first
    for target in aot.TARGETS:
        for setting in case.settings(target):
            constants = case.constants(codes, setting)
            assert n % constants["ALIGNMENT"] == 0
            if constants["EVEN"]:
                assert not any(size % setting[side] for size in (n, *heights) for side in ("KEPT", "INNER"))


# ---- the gates can fail


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, 2 * tl.load(x_ptr + place, mask=place < n), mask=place < n)


def double_variant(attrs: tuple[str, ...]) -> Variant:
    return Variant(
        name="double",
        kernel=double_kernel,
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"},
        constexprs={"BLOCK": 1024},
        attrs=attrs,
        num_warps=4,
        num_stages=1,
        uses_tensor_cores=False,
        grid=lambda call: (triton.cdiv(call["n"], call["BLOCK"]),),
    )


ALIGNED = double_variant(attrs=("x_ptr", "y_ptr", "n"))


@pytest.mark.parametrize("target", QUICK_TARGETS)
def test_a_sound_kernel_passes(target: str) -> None:
    assert aot.faults(aot.TARGETS[target], product_variant("bf16", block=64)) == []
    assert aot.faults(aot.TARGETS[target], ALIGNED) == []


@pytest.mark.parametrize("target", QUICK_TARGETS)
def test_missing_promises_are_found(target: str) -> None:
    without_tensor_cores = dataclasses.replace(ALIGNED, uses_tensor_cores=True)
    assert aot.faults(aot.TARGETS[target], without_tensor_cores) == ["no tensor-core instruction"]
    assert aot.faults(aot.TARGETS[target], double_variant(attrs=())) == ["no load of 16 bytes"]


@pytest.mark.parametrize(("target", "num_warps", "block"), [("sm_80", 1, 128), ("gfx942", 2, 256)])
def test_spills_are_found(target: str, num_warps: int, block: int) -> None:
    """512 fp32 sums a thread, and their factors, where NVIDIA has 255 registers and AMD 512."""
    variant = product_variant("bf16", num_warps=num_warps, num_stages=1, block=block)
    [fault] = aot.faults(aot.TARGETS[target], variant)
    assert re.match(r"\d+ spills, \d+ bytes of stack", fault)


def test_too_much_shared_memory_is_found() -> None:
    variant = product_variant("fp32", "tf32", num_stages=5, block=128)  # 4 buffers in flight, 32 KiB each
    assert aot.faults(aot.TARGETS["sm_80"], variant) == []
    assert aot.faults(aot.TARGETS["sm_86"], variant) == [f"{2**17} bytes of shared memory, of {99 * 1024}"]


def test_instructions_of_the_loop_are_counted() -> None:
    """A turn of the loop multiplies 64 × 32 by 32 × 64: 4 × 8 tiles of 16 × 8 in 2 steps, by 4 warps of 32 threads."""
    needs = aot.resources(aot.compile_for(aot.TARGETS["sm_80"], product_variant("bf16", block=64)))
    assert needs.loop_instructions_per_element(64 * 32, "HMMA") == 4 * 8 * 2 * 32 / (64 * 32)
    assert needs.loop_instructions_per_element(64 * 32) > 4 * needs.loop_instructions_per_element(64 * 32, "HMMA")
