"""The CUDA kernel of `gram_`: executed on the CPU by a model of a GPU (tests/simt), and compiled for GPUs by nvcc.

The model runs csrc/cuda/gram.cu as it stands, from its launcher to its instructions; what it checks beyond the result
is said in tests/simt/simt.h. A list of faults, planted one by one, shows that all this finds them.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import gram
from tests.emulation.ptx import EmulationError
from tests.helpers import ROOT, nvcc

CUDA = ROOT / "csrc" / "cuda"
SIMT = ROOT / "tests" / "emulation" / "simt"

# Variables that are not initialized hold garbage. glibc's checked longjmp takes a switch between fibers for an error.
FLAGS = ["-std=c++20", "-O2", "-w", "-ftrivial-auto-var-init=pattern", "-U_FORTIFY_SOURCE"]

# Relative Frobenius error against fp64. What tensor cores cut off biases a sum of 32 tokens by 1e-7 (bf16) and, since
# products of fp16 have 22 bits where a sum keeps 25, by twice that; fp32 input is rounded to 22 bits besides.
TOLERANCE = {"bf16": 2e-7, "fp16": 3e-7, "fp32": 1e-6}
SCALED_TOLERANCE = 2e-6  # of |ΔH_ij| / √(H_ii H_jj), which also sees small features beside large ones


@dataclass(frozen=True)
class Case:
    """One call of the launcher. Strides and the offset of the first element are in elements."""

    element: str
    features: int
    tokens: int
    x_stride: int = 0  # the next multiple of 8
    h_stride: int = 0  # features
    offset: int = 0
    masked: bool = False  # every fourth token is NaN and must not be read
    alike: bool = False  # the features have a mean, so that every sum grows
    seed: int = 1  # of the order in which threads run
    multiprocessors: int = 1
    launch_error: int = 0

    def __str__(self) -> str:
        defaults = Case("", 0, 0)
        others = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(defaults, name)][3:]
        return "-".join([self.element, f"{self.features}x{self.tokens}", *others])


class FaultError(Exception):
    """What the model reported of a kernel."""


@dataclass(frozen=True)
class Harness:
    """The kernel with its harness, compiled for the CPU."""

    program: Path

    def run(self, case: Case) -> dict[str, float]:
        values = vars(case) | {
            "x_stride": case.x_stride or -(-case.features // 8) * 8,
            "h_stride": case.h_stride or case.features,
        }
        words = [f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in values.items()]
        run = subprocess.run([self.program, *words], capture_output=True, text=True, timeout=600, check=False)
        if run.returncode:
            raise FaultError(run.stderr.strip() or f"status {run.returncode}")
        return json.loads(run.stdout)

    def check(self, case: Case) -> dict[str, float]:
        found = self.run(case)
        if found["error"] or found["relative"] > TOLERANCE[case.element] or found["scaled"] > SCALED_TOLERANCE:
            raise FaultError(str(found))
        return found


def build(cache_folder: Path, source: str, includes: tuple[Path, ...] = (CUDA, SIMT)) -> Harness:
    """Compile a program of tests/simt, unless the same text has been compiled before."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the model with")
    files = [path for folder in includes for path in sorted(folder.iterdir()) if path.is_file()]
    content = b"".join([" ".join(FLAGS).encode(), source.encode(), *(path.read_bytes() for path in files)])
    program = cache_folder / hashlib.sha256(content).hexdigest()[:32]
    if not program.exists():
        folders = [word for folder in includes for word in ("-I", str(folder))]
        built = program.with_suffix(f".{os.getpid()}")  # two sessions may build at once
        run = subprocess.run(
            [compiler, *FLAGS, *folders, str(SIMT / source), "-o", str(built)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        built.rename(program)
    return Harness(program)


def folder_to_keep(config: pytest.Config) -> Path | None:
    cache = getattr(config, "cache", None)  # which is not there under `-p no:cacheprovider`
    return cache and cache.mkdir("simt")


@pytest.fixture(scope="session")
def cache_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_to_keep(pytestconfig) or tmp_path_factory.mktemp("simt")


def test_pytest_may_run_without_its_cache() -> None:
    assert folder_to_keep(object()) is None


@pytest.fixture(scope="session")
def harness(cache_folder: Path) -> Harness:
    return build(cache_folder, "gram.cpp")


# ---- the model itself


def test_layouts_are_those_of_the_manual(cache_folder: Path) -> None:
    program = build(cache_folder, "layouts.cpp", includes=(SIMT,)).program
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- the kernel, executed

FEATURES = (1, 7, 64, 128, 129, 200, 576)
TOKENS = (1, 31, 128, 300)
EVERY_SHAPE = [
    Case(element, features, tokens, masked=masked)
    for element, features, tokens, masked in itertools.product(TOLERANCE, FEATURES, TOKENS, (False, True))
]
# For every day each shape with a mask or without, and of 576 features, which take a second and more, the longest.
DAILY = [
    case
    for case in EVERY_SHAPE
    if case.masked == (case.tokens in (31, 300)) and (case.features < 576 or case.tokens == 300)
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if case in DAILY else pytest.mark.slow) for case in EVERY_SHAPE]
)
def test_h_is_that_of_fp64(harness: Harness, case: Case) -> None:
    harness.check(case)


LAYOUTS: dict[str, dict[str, Any]] = {
    "stride": {"x_stride": 208},
    "unaligned-stride": {"x_stride": 131},
    "unaligned-pointer": {"offset": 1},
    "8-byte-pointer": {"offset": 2},
    "h-stride": {"h_stride": 131},
    "64-bit-offsets-in-x": {"x_stride": 2**28},  # so that the second chunk of a thread is past 2^32
    "64-bit-offsets-in-unaligned-x": {"x_stride": 2**28 + 1},
    "64-bit-offsets-in-h": {"h_stride": 2**25},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("element", TOLERANCE)
def test_any_layout_does(harness: Harness, element: str, layout: str) -> None:
    packed = Case(element, 129, 70, masked=True)
    found = harness.check(replace(packed, **LAYOUTS[layout]))
    assert found["hash"] == harness.run(packed)["hash"]  # and takes the same sums


# On a GPU of 13 multiprocessors: one tile and three, of few tokens and of many.
@pytest.mark.parametrize(
    ("features", "tokens", "launches"),
    [(64, 300, 1), (64, 3000, 2), pytest.param(200, 2000, 2, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("element", TOLERANCE)
def test_tokens_are_split_where_tiles_are_few(
    harness: Harness, element: str, features: int, tokens: int, launches: int
) -> None:
    found = harness.check(Case(element, features, tokens, masked=True, multiprocessors=13))
    assert found["launches"] == launches  # one for the sums, one to add them up
    assert (found["scratch"] > 0) == (launches > 1)


# 4096 tokens to a range, and no more ranges than multiprocessors: of 9000 tokens, 808 are left for the last launch.
@pytest.mark.parametrize(("multiprocessors", "launches"), [(1, 3), (2, 3)])
def test_many_tokens_take_several_launches(harness: Harness, multiprocessors: int, launches: int) -> None:
    found = harness.check(Case("bf16", 64, 9000, masked=True, multiprocessors=multiprocessors))
    assert found["launches"] == launches
    assert (found["scratch"] > 0) == (multiprocessors > 1)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("element", TOLERANCE)
def test_long_sums_stay_precise(harness: Harness, element: str, alike: bool) -> None:
    """4096 tokens in one range: the bound is the same, though ordinary summation would have lost some of it."""
    harness.check(Case(element, 8, 4096, alike=alike))


@pytest.mark.slow
def test_a_million_tokens_stay_precise(harness: Harness) -> None:
    """In 256 launches, each of which adds to H: every element, and not only their norm, is good to 1e-6."""
    found = harness.check(Case("bf16", 8, 2**20, alike=True))
    assert found["launches"] == 256
    assert found["scaled"] <= 1e-6


@pytest.mark.parametrize(("tokens", "multiprocessors"), [(300, 1), pytest.param(2000, 13, marks=pytest.mark.slow)])
def test_the_order_of_threads_does_not_matter(harness: Harness, tokens: int, multiprocessors: int) -> None:
    cases = [Case("bf16", 200, tokens, masked=True, seed=seed, multiprocessors=multiprocessors) for seed in (1, 2, 3)]
    assert len({harness.run(case)["hash"] for case in cases}) == 1


def test_nothing_to_add(harness: Harness) -> None:
    assert harness.check(Case("bf16", 64, 0))["launches"] == 0


def test_an_error_of_the_launch_is_passed_on(harness: Harness) -> None:
    assert harness.run(Case("bf16", 64, 32, launch_error=98))["error"] == 98


# ---- planted faults

KERNEL, LAUNCHER = "gram.cuh", "gram.cu"


@dataclass(frozen=True)
class Mutation:
    text: str  # stands exactly once in the file
    replacement: str
    file: str = KERNEL


MUTATIONS = {
    "no barrier": Mutation("    simt::block_sync();\n", ""),
    "a barrier that not all reach": Mutation("    simt::block_sync();", "    if (warp != 3) simt::block_sync();"),
    "no wait": Mutation("    simt::cp_async_wait<kStages - 2>();\n", ""),
    "a wait for one group too few": Mutation("cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
    "barrier before wait": Mutation(
        "    simt::cp_async_wait<kStages - 2>();\n",
        "    simt::block_sync();\n    simt::cp_async_wait<kStages - 2>();\n    if (false)\n",
    ),
    "ends with copies under way": Mutation("  simt::cp_async_wait<0>();", "  "),
    "stages that overlap": Mutation("input.copy(free_slot, admitted)", "input.copy(slot, admitted)"),
    "a ring of two stages in the room of three": Mutation(
        "slot = slot == kStages - 1 ? 0 : slot + 1", "slot = slot == kStages - 2 ? 0 : slot + 1"
    ),
    "shared memory for one stage too few": Mutation("kSharedBytes = kStages * 2", "kSharedBytes = (kStages - 1) * 2"),
    "rows that are not aligned": Mutation("kRow = kTile + 8", "kRow = kTile + 4"),
    "rows that overlap": Mutation("kRow = kTile + 8", "kRow = kTile - 8"),
    "the quarters of A swapped": Mutation(
        "(lane % 8 + matrix / 2 * 8) * kRow + matrix % 2 * 8", "(lane % 8 + matrix % 2 * 8) * kRow + matrix / 2 * 8"
    ),
    "the halves of A swapped": Mutation("row + half * 16 * kRow", "row + (1 - half) * 16 * kRow"),
    "the quarters of B swapped": Mutation(
        "{{{quarters[0], quarters[1]}, {quarters[2], quarters[3]}}}",
        "{{{quarters[0], quarters[2]}, {quarters[1], quarters[3]}}}",
    ),
    "fp32: the rows of A swapped": Mutation("e / 2 * 4 * kRow + e % 2 * 8", "e % 2 * 4 * kRow + e / 2 * 8"),
    "fp32: low parts left out": Mutation("    simt::mma_m16n8k8_tf32(d, a.high, b.low);\n", ""),
    "fp32: the wrong low part": Mutation(
        "simt::mma_m16n8k8_tf32(d, a.low, b.high)", "simt::mma_m16n8k8_tf32(d, a.low, b.low)"
    ),
    "fp32: an operand that is not rounded": Mutation("low = simt::round_to_tf32(value - high)", "low = value - high"),
    "a load that not all lanes of a warp reach": Mutation(
        "for (int half = 0; half < 2; ++half) simt::ldmatrix",
        "for (int half = 0; half < 2; ++half) if (lane < 31) simt::ldmatrix",
    ),
    "the mask ignored": Mutation("(keep == nullptr || simt::load_global(keep + c * kRowsAtOnce) != 0)", "true"),
    "the mask of another token": Mutation("simt::load_global(keep + c * kRowsAtOnce)", "simt::load_global(keep)"),
    "the mask does not move on": Mutation("    if (keep != nullptr) keep += kTokens;\n", ""),
    "the last token ignored": Mutation("c * kRowsAtOnce < tokens &&", "c * kRowsAtOnce < tokens - 1 &&"),
    "tokens past the last": Mutation("c * kRowsAtOnce < tokens &&", "c * kRowsAtOnce <= tokens &&"),
    "features past the last": Mutation("left < 0 ? 0 : left < kChunk ? left : kChunk", "left < 0 ? 0 : kChunk"),
    "chunks past the last feature": Mutation(
        "left < 0 ? 0 : left < kChunk ? left : kChunk", "left < kChunk && left > 0 ? left : kChunk"
    ),
    "copies of 16 bytes whatever the alignment": Mutation(
        "aligned ? gram_kernel<Element, true> :", "true ? gram_kernel<Element, true> :", LAUNCHER
    ),
    "the stride forgotten in the alignment": Mutation(
        "static_cast<int64_t>(sizeof(Element)) % kChunkBytes == 0",
        "static_cast<int64_t>(sizeof(Element)) % 1 == 0",
        LAUNCHER,
    ),
    "the pointer forgotten in the alignment": Mutation(
        "reinterpret_cast<uintptr_t>(arguments.x) % kChunkBytes == 0 &&", "", LAUNCHER
    ),
    "features past the last, not aligned": Mutation("if (e < there)", "if (e < kChunk)"),
    "chunks not aligned that do not begin at zero": Mutation("Chunk chunk{};", "Chunk chunk;"),
    "32-bit offsets in x, of ranges and rows": Mutation(
        "(begin + row) * arguments.x_row_stride", "static_cast<int>((begin + row) * arguments.x_row_stride)"
    ),
    "32-bit offsets in x, of chunks": Mutation(
        "c * kRowsAtOnce * row_stride;", "static_cast<int>(c * kRowsAtOnce * row_stride);"
    ),
    "32-bit offsets in x, of stages": Mutation(
        "source[side] += kTokens * row_stride", "source[side] += static_cast<int>(kTokens * row_stride)"
    ),
    "32-bit offsets in h": Mutation("i * arguments.h_row_stride", "static_cast<int>(i * arguments.h_row_stride)"),
    "the upper triangle": Mutation("tile.column > tile.row) return;\n\n", "tile.column < tile.row) return;\n\n"),
    "above the diagonal of H": Mutation(
        "i < arguments.features && j <= i", "i < arguments.features && j < arguments.features"
    ),
    "below the last row of H": Mutation("i < arguments.features && j <= i", "j <= i"),
    "the diagonal of H left out": Mutation("i < arguments.features && j <= i", "i < arguments.features && j < i"),
    "rows and columns of D swapped": Mutation("lane / 4 + e / 2 * 8;", "lane / 4 + e % 2 * 8;"),
    "H overwritten": Mutation("sum[p].value[e] += simt::load_global(address)", ""),
    "warps on each other's columns": Mutation("warp / 2 * 32 + piece", "warp / 4 * 32 + piece"),
    "tensor cores sum on": Mutation(
        "          Step::multiply(product.value, a, b[n]);\n          sum[m * kPieceColumns + n] += product;\n",
        "          Step::multiply(sum[m * kPieceColumns + n].value, a, b[n]);\n",
    ),
    "one running sum": Mutation("stage % kStagesPerSum == kStagesPerSum - 1 ||", ""),
    "sums that are not begun anew": Mutation("        sum[piece] = {};\n", ""),
    "the last sum dropped": Mutation(" || stage == stages - 1", ""),
    "a product that does not begin at zero": Mutation("Quad product = {};", "Quad product;"),
    "the last stage dropped": Mutation("stage < stages; ++stage", "stage < stages - 1; ++stage"),
    "ranges that overlap": Mutation("range * arguments.tokens_per_range;", "range * (arguments.tokens_per_range - 1);"),
    "ranges that go on": Mutation("full < arguments.tokens ? full : arguments.tokens", "arguments.tokens"),
    "a range added twice": Mutation(
        "int range = 0; range < arguments.ranges; ++range", "int range = -1; range < arguments.ranges; ++range"
    ),
    "a range left out": Mutation(
        "int range = 0; range < arguments.ranges; ++range", "int range = 1; range < arguments.ranges; ++range"
    ),
    "every range adds to H": Mutation("arguments.partial == nullptr) {", "true) {"),
    "partial sums of tiles in one place": Mutation("range * arguments.tiles + tile.index()", "range + tile.index()"),
    "tiles counted as if all were there": Mutation(
        "int64_t{row} * (row + 1) / 2 + column", "int64_t{row} * row + column"
    ),
    "scratch for one range too few": Mutation("* tiles * ranges : 0", "* tiles * (ranges - 1) : 0", LAUNCHER),
    "partial sums not added up": Mutation("error == 0 && ranges > 1", "error == 0 && ranges > 99", LAUNCHER),
    "later launches on the first tokens": Mutation(
        " + first * gram.x_row_stride * bytes_of(gram.element)", "", LAUNCHER
    ),
    "later launches with the first tokens' mask": Mutation("gram.keep + first", "gram.keep", LAUNCHER),
    "the last launch as long as the others": Mutation(
        "std::min(launches.tokens_per_launch, gram.tokens - first)", "launches.tokens_per_launch", LAUNCHER
    ),
    "another stream": Mutation("kSharedBytes, stream, arguments)", "kSharedBytes, nullptr, arguments)", LAUNCHER),
    "an error of the launch forgotten": Mutation("    if (error != 0) return error;\n", "", LAUNCHER),
}
DAILY_MUTATIONS = ("no barrier", "no wait", "the quarters of B swapped", "the mask ignored")

# The cheapest first: most faults show at once.
FAULT_CASES = [
    Case("bf16", 136, 70, masked=True),
    Case("fp32", 130, 45, masked=True),
    Case("fp16", 129, 70, offset=1, x_stride=131),
    Case("bf16", 130, 40, x_stride=131),
    Case("bf16", 130, 40, offset=1),
    Case("bf16", 130, 64, x_stride=2**28),
    Case("fp16", 130, 64, h_stride=2**25),
    Case("bf16", 264, 1200, masked=True, multiprocessors=80),
    Case("bf16", 64, 4096),
    Case("bf16", 8, 4200, masked=True),
]


def faults(harness: Harness) -> str | None:
    """The first thing found wrong, if any."""
    for case in FAULT_CASES:
        try:
            harness.check(case)
        except FaultError as error:
            return f"{case}: {error}"
    if harness.run(Case("bf16", 64, 32, launch_error=98))["error"] != 98:
        return "an error of the launch is not passed on"
    return None


def plant(folder: Path, mutation: Mutation) -> Path:
    """A copy of the sources with the fault."""
    sources = folder / "cuda"
    shutil.copytree(CUDA, sources)
    text = (sources / mutation.file).read_text()
    assert text.count(mutation.text) == 1, f"{mutation.file} has {text.count(mutation.text)} times {mutation.text!r}"
    (sources / mutation.file).write_text(text.replace(mutation.text, mutation.replacement))
    return sources


def test_the_kernel_as_it_stands_has_no_fault(harness: Harness) -> None:
    """Else every fault would be "found"."""
    assert faults(harness) is None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DAILY_MUTATIONS else pytest.mark.slow) for name in MUTATIONS]
)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    sources = plant(tmp_path, MUTATIONS[name])
    assert faults(build(tmp_path, "gram.cpp", includes=(sources, SIMT))) is not None


# ---- compiled for GPUs

TARGETS = ("sm_80", "sm_90", "sm_100")
KERNELS = {  # as nvcc names them
    f"gram_kernel{element}_{'aligned' if aligned else 'unaligned'}": f"11gram_kernelI{mangled}Lb{aligned}EE"
    for element, mangled in (("bf16", "NS0_8BFloat16E"), ("fp16", "NS0_7Float16E"), ("fp32", "f"))
    for aligned in (1, 0)
} | {"add_ranges_kernel": "17add_ranges_kernelE"}

# A step of the loop, for a warp's 64 x 32 in 16 pieces of 16 x 8. 16 bits: 4 + 4 factors of 32 tokens, each product in
# two halves. fp32: three products of 8 tokens. A thread copies 4 chunks a stage: two stages before the loop, one in it.
BITS_16 = {"mma.sync.aligned.m16n8k16.row.col.f32.{}": 16 * 2, "ldmatrix.sync.aligned.m8n8.x4.trans": 4 * 2 + 4}
FP32 = {"mma.sync.aligned.m16n8k8.row.col.f32.tf32": 16 * 3, "cvt.rna.tf32.f32": 2 * (4 * 4 + 4 * 2)}
COPIES = 3 * 4


def instructions(kernel: str) -> dict[str, int]:
    """How often each of the instructions that matter stands in the PTX of a kernel."""
    counts = dict.fromkeys(("mma.sync", "ldmatrix", "cvt.rna.tf32", "cp.async.cg.shared.global"), 0)
    if kernel == "add_ranges_kernel":
        return counts
    per_element = FP32 if "fp32" in kernel else BITS_16
    named = {name.format("bf16" if "bf16" in kernel else "f16"): count for name, count in per_element.items()}
    total = {short: sum(count for name, count in named.items() if name.startswith(short)) for short in counts}
    return total | named | {"cp.async.cg.shared.global": COPIES if kernel.endswith("_aligned") else 0}


@pytest.fixture(scope="session")
def compiler() -> str:
    found = nvcc.find_nvcc()
    if found is None:
        pytest.skip("no nvcc: neither CUDA_HOME nor PATH nor /usr/local/cuda* has one")
    return found


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, compiler: str, tmp_path_factory: pytest.TempPathFactory) -> nvcc.Compiled:
    return nvcc.compile_gram(compiler, request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_compiles_without_spills(compiled: nvcc.Compiled, kernel: str) -> None:
    usage = compiled.resources(KERNELS[kernel])
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in usage


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_has_the_instructions_it_should(compiled: nvcc.Compiled, kernel: str) -> None:
    entry, expected = compiled.entry(KERNELS[kernel]), instructions(kernel)
    assert {name: len(re.findall(rf"{re.escape(name)}\b", entry)) for name in expected} == expected
    assert not re.search(r"\.local\b|\bcall\b", entry)


@pytest.mark.slow
def test_the_loop_has_the_instructions_that_the_documented_share_counts(compiler: str, tmp_path: Path) -> None:
    """Of the additions, half are in a branch that every 16th stage takes. Other releases of nvcc may differ a bit."""
    aot = pytest.importorskip("tests.helpers.aot", reason="nvdisasm comes with Triton", exc_type=ImportError)
    nvcc.compile_gram(compiler, "sm_90", tmp_path)
    [kernel] = re.findall(
        rf"^\.text\.\w*{KERNELS['gram_kernelbf16_aligned']}.*?(?=^\.text\.|\Z)",
        aot.disassembled(tmp_path / "gram.cubin"),
        re.DOTALL | re.MULTILINE,
    )
    _, loop = aot.nvidia_instructions(kernel)
    products = sum(count for name, count in loop.items() if name.startswith("HMMA"))
    assert products == gram.PRODUCTS
    assert loop.total() - products - loop["FADD"] // 2 == pytest.approx(gram.OTHERS, rel=0.1)


# ---- compiled, and executed: the same instructions as on a GPU, by the emulator that Triton's kernels are tested with

ARGUMENTS = "QqQqqiiQqqQ"  # as gram.cuh has them
SHARED_BYTES = 3 * 2 * 64 * (128 + 8)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compiled_is_right(compiled: nvcc.Compiled, element: str, aligned: bool = True, ranges: int = 1) -> bool:
    """Whether H of 70 tokens, a quarter of them masked, is that of fp64, and its upper triangle untouched."""
    n, t = 136, 70  # the emulator knows no copy of less than 16 bytes, so n is a multiple of 8
    generator = torch.Generator().manual_seed(0)
    x = torch.full((t, n + (8 if aligned else 1)), torch.nan, dtype=DTYPES[element])
    keep = torch.rand(t, generator=generator) < 0.75
    kept = torch.randn(int(keep.sum()), n, generator=generator).to(x.dtype)
    x[keep, :n] = kept
    h = torch.randn(n, n, generator=generator)
    expected = h.double() + (kept.double().T @ kept.double()).tril()

    partial = torch.full((ranges, 3, 16, 256, 4), torch.nan)  # 3 tiles, 16 pieces, 256 threads
    values = (x, x.stride(0), keep, t, 96 // ranges, ranges, n, h, n, 3, partial if ranges > 1 else 0)
    kernel = KERNELS[f"gram_kernel{element}_{'aligned' if aligned else 'unaligned'}"]
    nvcc.execute(compiled.entry(kernel), ARGUMENTS, values, (2, 2, ranges), SHARED_BYTES)
    if ranges > 1:
        nvcc.execute(compiled.entry(KERNELS["add_ranges_kernel"]), ARGUMENTS, values, (2, 2, 16), 0)
    return bool((h - expected).norm() <= TOLERANCE[element] * expected.norm() and (h - expected).triu(1).norm() == 0)


@pytest.mark.parametrize("compiled", ["sm_80"], indirect=True)  # PTX differs by target in nothing that matters
@pytest.mark.parametrize("ranges", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("element", TOLERANCE)
def test_the_compiled_kernels_add_to_h(compiled: nvcc.Compiled, element: str, aligned: bool, ranges: int) -> None:
    assert compiled_is_right(compiled, element, aligned, ranges)


PRIMITIVES = "ptx.cuh"
PRIMITIVE_MUTATIONS = {
    "no barrier": Mutation("__syncthreads();", "", PRIMITIVES),
    "a wait for one group too few": Mutation('"n"(kPending)', '"n"(kPending + 1)', PRIMITIVES),
    "copies that read what they should not": Mutation('"r"(bytes)', '"r"(16)', PRIMITIVES),
    "the results of ldmatrix swapped": Mutation(
        '"=r"(r[0]), "=r"(r[1]), "=r"(r[2])', '"=r"(r[0]), "=r"(r[2]), "=r"(r[1])', PRIMITIVES
    ),
    "ldmatrix without transposing": Mutation("x4.trans.shared", "x4.shared", PRIMITIVES),
    "the rows of A swapped": Mutation(
        '"r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1]))',
        '"r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[0]))',
        PRIMITIVES,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIMITIVE_MUTATIONS)
def test_a_fault_planted_in_the_instructions_is_found(name: str, compiler: str, tmp_path: Path) -> None:
    source = plant(tmp_path, PRIMITIVE_MUTATIONS[name]) / "gram.cu"
    compiled = nvcc.compile_gram(compiler, "sm_80", tmp_path, source)
    try:
        right = compiled_is_right(compiled, "bf16") and compiled_is_right(compiled, "fp32")
    except EmulationError:
        right = False
    assert not right


# ---- the whole extension


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is no CUDA build: the whole extension cannot be built")
def test_the_extension_builds_and_imports() -> None:
    run = subprocess.run([sys.executable, CUDA / "check_build.py"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
