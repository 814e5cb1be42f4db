"""Faults planted in the kernels are found: in the source by the test they name, dropped barriers by the emulator."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aot
import ptx
import pytest
import torch
from ptx.sample import product_variant

from quailora.kernels.variants import Variant

ROOT = Path(__file__).resolve().parent.parent

# ---- faults in the source


@dataclass(frozen=True)
class Mutation:
    file: str  # in kernels/
    text: str  # stands in it exactly once
    replacement: str
    test: str  # that must fail, as pytest names it, from tests/


ERROR_PRODUCTS = "interpreted/test_error_products.py"
GRAM_PRODUCT = "interpreted/test_gram_product.py"
CHOLESKY = "interpreted/test_cholesky.py"

MUTATIONS = {
    "swapped nibbles": Mutation(
        "error_products.py",
        "tl.join(high, low)",
        "tl.join(low, high)",
        f"{ERROR_PRODUCTS}::test_the_high_nibble_comes_first",
    ),
    "swapped nibbles, odd rows": Mutation(
        "error_products.py",
        "tl.where(elements % 2 == 0, high, low)",
        "tl.where(elements % 2 == 0, low, high)",
        f"{ERROR_PRODUCTS}::test_the_high_nibble_comes_first",
    ),
    "absmax as if blocks began with rows": Mutation(
        "error_products.py",
        "(row_starts[:, None] + granules[None, :]) // BLOCKSIZE",
        "row_starts[:, None] // BLOCKSIZE + granules[None, :] // BLOCKSIZE",
        f"{ERROR_PRODUCTS}::test_each_block_has_its_own_absmax",
    ),
    "one column too many of W": Mutation(
        "error_products.py",
        "inside = there[:, None] & (columns < n)[None, :]",
        "inside = there[:, None] & (columns <= n)[None, :]",
        f"{ERROR_PRODUCTS}::test_nothing_beyond_the_edges_is_read",
    ),
    "one row too many of P": Mutation(
        "error_products.py",
        "thin_mask = (inner < inner_size)[:, None]",
        "thin_mask = (inner <= inner_size)[:, None]",
        f"{ERROR_PRODUCTS}::test_nothing_beyond_the_edges_is_read",
    ),
    "Q not rounded": Mutation(
        "error_products.py",
        "(ROWS, COLUMNS)).to(Q_DTYPE).to(tl.float32)",
        "(ROWS, COLUMNS))",
        f"{ERROR_PRODUCTS}::test_q_is_rounded_to_the_compute_dtype",
    ),
    "32-bit offsets": Mutation(
        "error_products.py",
        "row_starts = rows.to(tl.int64) * n",
        "row_starts = (rows * n).to(tl.int64)",
        f"{ERROR_PRODUCTS}::test_offsets_beyond_two_to_the_31",
    ),
    "the upper triangle of H": Mutation(
        "gram_product.py",
        "rows[:, None] >= inner[None, :]",
        "rows[:, None] <= inner[None, :]",
        f"{GRAM_PRODUCT}::test_every_element_is_taken_from_the_lower_triangle_once",
    ),
    "one row too many of the right side": Mutation(
        "gram_product.py",
        "mask=(inner < n)[:, None]",
        "mask=(inner <= n)[:, None]",
        f"{GRAM_PRODUCT}::test_nothing_beyond_the_edges_of_p_is_read",
    ),
    "a row scaled once, not twice": Mutation(
        "cholesky.py",
        "(row * scale)[None, :]",
        "row[None, :]",
        f"{CHOLESKY}::test_the_inverse_factor_is_that_of_fp64",
    ),
    "the minor before the one that fails": Mutation(
        "cholesky.py",
        "start + j + 1",
        "start + j",
        f"{CHOLESKY}::test_the_first_minor_that_is_not_positive_is_named",
    ),
}


QUICK = "the upper triangle of H"


def run_test(tree: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a process that takes the package from `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    if any(test.startswith("interpreted") for test in tests):
        environment["TRITON_INTERPRET"] = "1"
    names = [str(ROOT / "tests" / test) for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names]
    return subprocess.run(command, env=environment, cwd=ROOT / "tests", capture_output=True, text=True, check=False)


def package_copy(tree: Path, mutation: Mutation | None = None) -> Path:
    """The package as links to its files, but for the one file with the fault."""
    for source, target in ((ROOT / "quailora", tree / "quailora"), (ROOT / "kernels", tree / "quailora" / "kernels")):
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.name != "__pycache__":
                (target / file.name).symlink_to(file)
    if mutation:
        faulty = tree / "quailora" / "kernels" / mutation.file
        text = faulty.read_text()
        assert text.count(mutation.text) == 1, (
            f"{mutation.file} has {text.count(mutation.text)} times {mutation.text!r}"
        )
        faulty.unlink()
        faulty.write_text(text.replace(mutation.text, mutation.replacement))
    return tree


@pytest.mark.slow
def test_the_copied_package_is_sound(tmp_path: Path) -> None:
    """Else every fault would be "found"."""
    run = run_test(package_copy(tmp_path), *sorted({mutation.test for mutation in MUTATIONS.values()}))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in MUTATIONS]
)
def test_a_fault_in_the_source_is_found(name: str, tmp_path: Path) -> None:
    run = run_test(package_copy(tmp_path, MUTATIONS[name]), MUTATIONS[name].test)
    # The interpreter reads real memory: a wrong offset may end the process.
    assert run.returncode in (pytest.ExitCode.TESTS_FAILED, -signal.SIGSEGV), run.stdout + run.stderr


def test_a_mutation_that_no_longer_applies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"error_products.py has 0 times 'no such text'"):
        package_copy(tmp_path, Mutation("error_products.py", "no such text", "", ""))


# ---- barriers and waits, dropped from the compiled kernel

SYNCHRONISATION = re.compile(r"(bar\.sync|cp\.async\.wait_group)\s+\d+;")


def needed_synchronisation(variant: Variant, launch: Callable[[Callable[[str], str]], bool]) -> list[str]:
    """The barriers and waits of the compiled kernel, less those that are not missed: Triton emits some twice.

    `launch` executes the variant with a rewriting of its PTX and says whether the result is right. One after the other
    is dropped, and put back if the emulator reports a fault or the result is wrong.
    """
    text = aot.compile_for(aot.TARGETS["sm_80"], variant).asm["ptx"]
    assert launch(lambda text: text)
    dropped: set[int] = set()
    needed = []
    for number, match in enumerate(SYNCHRONISATION.finditer(text)):

        def rewrite(text: str, without: frozenset[int] = frozenset(dropped | {number})) -> str:
            count = iter(range(10**6))
            return SYNCHRONISATION.sub(lambda found: "" if next(count) in without else found[0], text)

        try:
            missed = not launch(rewrite)
        except ptx.EmulationError:
            missed = True
        if missed:
            needed.append(match[1])
        else:
            dropped.add(number)
    return needed


def product_launch(variant: Variant) -> Callable[[Callable[[str], str]], bool]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, 224, generator=generator), torch.randn(224, 32, generator=generator)
    a, b = (a.bfloat16(), b.bfloat16()) if variant.signature["a_ptr"] == "*bf16" else (a, b)
    exact = a.double() @ b.double()

    def launch(rewrite: Callable[[str], str]) -> bool:
        c = torch.full((32, 32), torch.nan)
        ptx.run(variant, {"a_ptr": a, "b_ptr": b, "c_ptr": c, "m": 32, "n": 32, "k": 224}, rewrite=rewrite)
        return bool((c - exact).norm() < 2e-3 * exact.norm())  # tf32: 10 bits of mantissa, cut off

    return launch


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "ieee"), ("fp32", "tf32")])
def test_a_dropped_barrier_is_found(dtype: str, precision: str) -> None:
    """Without a pipeline there are four barriers, all of them needed: around a turn's loads, and around the result."""
    variant = product_variant(dtype, precision, num_warps=4, num_stages=1)
    assert needed_synchronisation(variant, product_launch(variant)) == ["bar.sync"] * 4


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "ieee"), ("fp32", "tf32")])
def test_a_dropped_wait_is_found(dtype: str, precision: str) -> None:
    """A pipeline waits for copies before the loop, in each turn and after it, each with a barrier; then stores."""
    variant = product_variant(dtype, precision, num_warps=4, num_stages=3)
    needed = needed_synchronisation(variant, product_launch(variant))
    assert needed.count("cp.async.wait_group") >= 3
    assert needed.count("bar.sync") >= 4


def test_one_warp_needs_no_barrier() -> None:
    variant = product_variant("bf16", num_warps=1, num_stages=1)
    assert needed_synchronisation(variant, product_launch(variant)) == []
