"""The benchmarks, as far as they need no GPU and no real model: they run, count right, and time only what is right."""

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_training
import tiny
import torch
from test_fake_cuda import CUDA, Launches, launches, linear  # noqa: F401  a fixture
from torch import Tensor

import quailora
from quailora import ops
from quailora.gram import Gram
from quailora.methods import METHODS
from quailora.precision import PRECISIONS
from quailora.solvers import Linear, solve_group

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import precision
import solver
import timing

PERFORMANCE = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()
CPU = torch.device("cpu")


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    main()


# ---- timing.py


def test_runs_alternate_and_the_first_do_not_count() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = timing.alternate(candidates, rounds=2)
    assert "".join(calls) == "ab" * 3
    assert {len(each.seconds) for each in timings.values()} == {2}


# ---- solver.py


def test_solver_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    run(solver.main, monkeypatch, "--scale", "tiny", "--shapes", "70b", "--rounds", "2", "--json", output)
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    rows = {(row["linears"], row["solver"], row["candidate"]): row for row in found["rows"]}
    on_a_cpu = set(solver.CANDIDATES) - {"fused", "cached"}
    groups = [group.name for group in solver.groups("70b")]
    assert rows.keys() == {(group, name, each) for group in groups for name in solver.SOLVERS for each in on_a_cpu}
    assert all(row["seconds"] > 0 and row["floor"] > 0 and row["objective"] > 0 for row in rows.values())
    assert found["missing"].keys() == {"fused", "cached"}
    for name, reason in found["missing"].items():
        assert reason in quailora.backends("cpu")["grouped_error_product"].others["triton"]
        assert f"Not run: {name}. {reason}" in shown
    assert solver.roofline(64, ["70b"]) in shown


@pytest.mark.parametrize("name", solver.SOLVERS)
def test_all_candidates_agree_with_fp64(name: str) -> None:
    """On a CPU those of the kernels go the same way, through the reference."""
    solver.check(solver.CANDIDATES, name, 64, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("name", solver.SOLVERS)
def test_all_candidates_agree_with_fp64_on_the_gpu(name: str) -> None:
    candidates, missing = solver.available(torch.device("cuda"))
    assert not missing
    solver.check(candidates, name, 64, torch.device("cuda"))


def test_what_is_wrong_is_not_timed() -> None:
    fused = solver.CANDIDATES["fused"]

    def perturbed(case: solver.Case, name: str) -> solver.Factors:
        # 5 % off in A, a quarter of a percent of ‖A Bᵀ X‖² off in the objective.
        return [(1.05 * a, b) for a, b in fused.run(case, name)]

    def too_large(case: solver.Case, name: str) -> Any:
        errors = fused.errors and copy.copy(fused.errors(case, name))
        errors.times = lambda thins: [1.01 * product for product in type(errors).times(errors, thins)]
        return errors

    for candidate, complaint in (
        (replace(fused, run=perturbed), "the objective of krylov"),
        (replace(fused, errors=too_large), "a product with E"),
    ):
        with pytest.raises(SystemExit, match=f"a mistake: {complaint}.* nothing is timed"):
            solver.check({"a mistake": candidate}, "krylov", 64, CPU)


@pytest.mark.parametrize("name", ["krylov", pytest.param("als", marks=pytest.mark.slow)])
@pytest.mark.parametrize("candidate", [name for name, each in solver.CANDIDATES.items() if each.form])
def test_candidates_on_a_gpu(candidate: str, name: str, launches: Launches) -> None:  # noqa: F811
    """As far as that can be without one: every tensor is on the device and of its shape."""
    group = solver.Group("some", (512, 256), 320)
    linears = [linear("nested", m, 320, torch.bfloat16) for m in group.rows]
    weights = [each.weight for each in linears]
    gram = torch.empty(320, 320, device=CUDA)
    case = solver.Case(group, 16, weights, weights, [each.quantized for each in linears], gram)
    factors = solver.CANDIDATES[candidate].run(case, name)
    assert [(tuple(a.shape), tuple(b.shape)) for a, b in factors] == [((m, 16), (320, 16)) for m in group.rows]
    assert {part.device for pair in factors for part in pair} == {CUDA}
    assert {part.dtype for pair in factors for part in pair} == {torch.float32}
    assert bool(launches) == (not candidate.startswith("torch"))


@pytest.mark.parametrize("name", solver.SOLVERS)
def test_counted_products_are_those_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[solver.Work] = Counter()

    def counted(operation: Any) -> Any:
        def run(first: Any, thins: list[Tensor], *, precision: str) -> Any:
            widths = [thin.shape[1] for thin in thins]
            if isinstance(first, Tensor):
                made[solver.gram_product(len(first), sum(widths), precision)] += 1
            else:
                for (error, _), width in zip(first, widths, strict=True):
                    made[solver.error_product(*error.shape, width, "dense", precision)] += 1
            return operation(first, thins, precision=precision)

        return run

    case = solver.Case.draw(solver.SMALL, 32, CPU)
    linears = [Linear(weight, q.dequantize(), 32) for weight, q in zip(case.originals, case.quantized, strict=True)]
    with precision.emulated(), monkeypatch.context() as patch:
        for operation in ("grouped_error_product", "grouped_error_product_t", "grouped_gram_product"):
            patch.setattr(ops, operation, counted(getattr(ops, operation)))
        solve_group(linears, case.gram, solver=name)
    products = [work for work in solver.solve_work(case.group, name, "dense", 32) if work.flops]
    assert made == Counter(products)


@pytest.mark.parametrize(
    ("name", "fused", "cached"), [("krylov", 9 * 2.5625, 4.5625 + 9 * 2), ("als", 58 * 2.5625, 4.5625 + 58 * 2)]
)
def test_counted_bytes(name: str, fused: float, cached: float) -> None:
    """Per element of E; what else is counted does not depend on its form."""
    group = solver.Group("o", (4096,), 4096)
    bytes = {form: sum(work.bytes for work in solver.solve_work(group, name, form, 64)) for form in ("fused", "cached")}
    assert bytes["fused"] - bytes["cached"] == pytest.approx((fused - cached) * 4096**2)


def test_counted_time_is_that_of_the_bound() -> None:
    gpu = solver.Gpu("round", 1e12, {"bf16": 1e14})
    thin = solver.error_product(4096, 4096, 16, "cached", "bf16")
    assert thin.bytes == 2 * 4096**2 + 4 * 16 * 8192
    assert thin.flops == 2 * 16 * 4096**2
    assert gpu.seconds([thin]) == thin.bytes / 1e12  # 34.1 µs; FLOPs take 5.4
    wide = solver.error_product(4096, 4096, 256, "cached", "bf16x3")
    assert wide.flops == 3 * 2 * 256 * 4096**2
    assert gpu.seconds([wide]) == wide.flops / 1e14  # 258 µs; bytes take 42
    assert gpu.seconds([thin, wide]) == gpu.seconds([thin]) + gpu.seconds([wide])


def test_compare_finds_what_is_slower_on_the_same_device_only() -> None:
    def found(device: str, **seconds: float) -> dict[str, Any]:
        rows = [
            {"model": "7b", "linears": "o", "solver": "krylov", "candidate": name, "seconds": value}
            for name, value in seconds.items()
        ]
        return {"device": device, "rank": 64, "scale": "full", "rows": rows}

    old = found("one", fused=1.0, cached=1.0)
    assert solver.compare(found("one", fused=1.19, cached=0.5, whole=9.0), old) == []
    assert solver.compare(found("one", fused=1.21, cached=1.0), old) == [
        "7b o krylov fused takes 1.21 times as long as before"
    ]
    assert solver.compare(found("another", fused=9.0, cached=9.0), old) == []


def test_compare_ends_with_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every time of before is cut to a tenth."""
    output = tmp_path / "found.json"
    arguments = ["--scale", "tiny", "--shapes", "7b", "--solver", "krylov", "--rounds", "2", "--json", output]
    run(solver.main, monkeypatch, *arguments)
    old = json.loads(output.read_text())
    for row in old["rows"]:
        row["seconds"] /= 10
    output.write_text(json.dumps(old))
    earlier = output.rename(tmp_path / "earlier.json")
    with pytest.raises(SystemExit, match="times as long as before"):
        run(solver.main, monkeypatch, *arguments, "--compare", earlier)
    assert output.exists()


def test_the_documented_roofline_is_what_is_counted() -> None:
    assert solver.roofline() in PERFORMANCE


# ---- precision.py


def test_emulated_products_round_as_the_kernels_do() -> None:
    # 1 + 2⁻¹⁰ + 2⁻¹¹: 10 bits of mantissa truncated, 7 bits rounded, 7 + 8 bits, all.
    x, one = torch.tensor([[1 + 2**-10 + 2**-11]]), torch.ones(1, 1)
    values = {name: float(precision.product(x, one, name)) for name in PRECISIONS}
    assert values == {"ieee": float(x), "bf16x3": float(x), "tf32": 1 + 2**-10, "bf16": 1.0}
    # bf16x3 leaves out the product of the low halves, 2⁻⁹ each here, and nothing else.
    y = torch.tensor([[1 + 2**-9]])
    assert float(precision.product(y, y, "bf16x3")) == 1 + 2**-8


def test_emulation_is_taken_for_the_kernels() -> None:
    """So the last product of a coarse krylov is made anew, as on a GPU."""
    assert ops.backends("cpu")["grouped_error_product"].backend == "reference"
    with precision.emulated():
        assert ops.backends("cpu")["grouped_error_product"].backend == "emulation"
    assert ops.backends("cpu")["grouped_error_product"].backend == "reference"


def test_blocks_are_spread_over_the_depth() -> None:
    layers = {f"model.layers.{block}.{name}": name for block in range(30) for name in "qk"}
    assert [int(name.split(".")[2]) for name in precision.spread(layers, 4)] == [0, 0, 10, 10, 19, 19, 29, 29]
    assert precision.spread(layers, None) == precision.spread(layers, 99) == layers


def test_coarser_products_leave_more_of_the_objective() -> None:
    """Synthetic layers, one with an outlier channel."""
    torch.manual_seed(0)
    layers = {}
    for name, outlier in (("even", 1.0), ("outlier", 1000.0)):
        gram = Gram(192)
        x = torch.randn(1024, 192)
        x[:, 7] *= outlier
        gram.update(x)
        layers[f"layers.0.{name}"] = ((0.02 * torch.randn(128, 192)).bfloat16(), gram)
    with precision.emulated():
        rows = precision.study(layers, solver.NF4, rank=16)
    found = {(row["solver"], row["E"], row["H"]): row for row in rows}
    assert found.keys() == {(name, *pair) for name, pairs in precision.PAIRS.items() for pair in pairs}
    for name, pairs in precision.PAIRS.items():
        assert found[name, *pairs[0]]["max"] == 0
    # The outlier's square is 1e6 times the others', and factors are rounded to 16 bits, and to 10 or 8.
    for name, coarse in (("krylov", "bf16"), ("als", "tf32")):
        assert found[name, "bf16x3", "bf16x3"]["max"] < precision.ALLOWED < found[name, coarse, "bf16x3"]["max"]
    lines = precision.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert [line.split("**")[1] for line in lines if "**" in line] == ["krylov", "als", "svd"]


@pytest.mark.slow
def test_precision_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    test_training.tokenizer().save_pretrained(checkpoint)
    text, output = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("\n".join(test_training.TEXTS))
    small = ["--rank", "4", "--samples", "8", "--length", "16", "--blocks", "1"]
    run(precision.main, monkeypatch, text, "--model", checkpoint, *small, "--json", output)
    rows = json.loads(output.read_text())
    assert {row["layers"] for row in rows} == {7}
    assert len(rows) == sum(map(len, precision.PAIRS.values()))


def test_the_default_precisions_are_those_of_the_documented_table() -> None:
    """The coarsest that costs no layer 0.01 %; for svd, where nothing depends on it, one that costs none."""
    rows = [[cell.strip(" *%") for cell in line.split("|")[1:-1]] for line in PERFORMANCE.splitlines()]
    table = [row for row in rows if len(row) == 6 and row[0] in precision.PAIRS and row[2] in ("bf16x3", "none")]
    most = {(name, e): float(largest) / 100 for name, e, _, _, largest, _ in table}
    for name in precision.PAIRS:
        chosen = METHODS[name].precision
        assert most[name, chosen] <= precision.ALLOWED
        if name != "svd":
            coarser = PRECISIONS[PRECISIONS.index(chosen) + 1]
            assert most[name, coarser] > precision.ALLOWED
