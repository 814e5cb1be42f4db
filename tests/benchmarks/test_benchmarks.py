"""The benchmarks, as far as they need no GPU and no real model: they run, count right, and time only what is right."""

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import quailora
from benchmarks.common import timing
from benchmarks.end_to_end import initialize, inputs, low_bits, refine
from benchmarks.kernels import gram, half, precision, scaling, solver
from quailora import ops
from quailora.calibration.gram import Gram
from quailora.ops import extension, reference
from quailora.ops.precision import PRECISIONS
from quailora.solvers import als, krylov
from quailora.solvers.config import SolverConfig
from quailora.solvers.inputs import Linear
from quailora.solvers.registry import SOLVERS
from quailora.solvers.solve import solve_group
from tests.helpers import ROOT, tiny
from tests.integration import test_training
from tests.integration.test_fake_cuda import CUDA, Launches, launches, linear  # noqa: F401  a fixture

PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
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


def test_a_timing_shows_its_median_and_half_its_spread() -> None:
    assert str(timing.Timing((0.01, 0.011, 0.012))) == "11 ms ± 9 %"
    assert str(timing.Timing((2.0, 2.0))) == "2 s ± 0 %"


def test_what_is_kept_says_where_it_was_measured(tmp_path: Path) -> None:
    timing.keep(tmp_path / "new" / "found.json", CPU, {"figure": 1.0})
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    libraries = {"quailora", "python", "torch", "transformers", "peft", "bitsandbytes"}
    assert found.keys() == libraries | {"machine", "device", "bf16_products", "cores", "threads", "figure"}
    assert found["device"] == timing.describe(CPU)
    assert (found["quailora"], found["threads"]) == (quailora.__version__, torch.get_num_threads())


# ---- refine.py


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3])
def test_refinement_is_measured_on_two_texts(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.checkpoint(tmp_path / "model")
    for seed, name in enumerate(("calibrate", "measure", "other")):
        rows = [json.dumps({"input_ids": sequence.tolist()}) for sequence in tiny.sequences(20, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    files = [tmp_path / f"{name}.jsonl" for name in ("calibrate", "measure", "other")]
    output = tmp_path / "found.json"
    arguments = [*files, "--model", model, "--bits", str(bits), "--work", tmp_path / "work", "--json", output]
    run(refine.main, monkeypatch, *arguments)
    first = json.loads(output.read_text())
    names = ["none", "layer by layer", "blocks"] if bits == 4 else ["layer by layer", "quantized inputs", "blocks"]
    if bits == 4 or find_spec("gptqmodel") is not None:
        names += ["model", "blocks, then model"]
    assert [row["factors"] for row in first["rows"]] == names
    assert all(row["measure"][0] > 1 and row["other"][0] > 1 for row in first["rows"])
    assert all(row["passes"] > 0 for row in first["rows"][-2:])
    monkeypatch.setattr(quailora, "build_adapter", None)  # what is kept is not made again
    run(refine.main, monkeypatch, *arguments)
    table = refine.table(first).splitlines()
    assert len(table) == 3 + len(names) and table[2].startswith("| full precision |")


# ---- inputs.py


def test_a_block_runs_group_by_group_as_it_does_by_itself() -> None:
    model: Any = tiny.model()
    hidden = torch.randn(2, 9, 64)
    rotary = model.model.rotary_emb(hidden[:1], torch.arange(12)[None])
    layer, seen = model.model.layers[0], []
    with torch.no_grad():
        found = inputs.Block(layer, rotary).run([hidden], {}, lambda group, _: seen.append(group))
        expected = layer(hidden, position_embeddings=tuple(part[:, :9] for part in rotary), attention_mask=None)
    torch.testing.assert_close(found[0], expected)
    assert seen == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3])
def test_inputs_are_compared_on_two_texts(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.checkpoint(tmp_path / "model")
    files = [tmp_path / f"{name}.jsonl" for name in ("calibrate", "measure", "other")]
    for seed, file in enumerate(files):
        tokens = torch.randint(tiny.VOCABULARY, (20, 24), generator=torch.Generator().manual_seed(seed))
        file.write_text("\n".join(json.dumps({"input_ids": row}) for row in tokens.tolist()))
    output = tmp_path / "found.json"
    arguments = [*files, "--model", model, "--bits", str(bits), "--rank", "8", "--depth", "1", "--json", output]
    run(inputs.main, monkeypatch, *arguments, "--arms", "full")
    run(inputs.main, monkeypatch, *arguments, "--arms", *list(inputs.ARMS)[1:])
    record = json.loads(output.read_text())
    assert [row["inputs"] for row in record["rows"]] == list(inputs.ARMS)
    assert all(0 < row["errors"][text][0] < 1 for row in record["rows"] for text in ("measure", "other"))
    assert all(row["scores"]["measure"][1] > 0 for row in record["rows"])
    assert len(inputs.table(record).splitlines()) == 2 + len(inputs.ARMS)


# ---- gram.py


@pytest.mark.skipif(extension.obstacle(CPU) is not None, reason="the extension is not built")
def test_gram_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gram, "PEAK", 64)
    output = tmp_path / "found.json"
    threads = torch.get_num_threads()
    run(gram.main, monkeypatch, "--tokens", "40", "--features", "32", "48", "--rounds", "2", "--json", output)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * 2 * len({1, threads})
    assert all(0 < row["error"] < gram.TOLERANCE and row["floor"] > 0 for row in rows)
    assert rows[0]["flops"] == 40 * 32 * 33
    monkeypatch.setattr(extension, "gram_", lambda h, x: h.copy_(1.00001 * x.float().T @ x.float()))
    with pytest.raises(SystemExit, match=r"ours, of 32 features in bfloat16, is off by (1e-05|9\.9\de-06), .* nothing"):
        run(gram.main, monkeypatch, "--tokens", "40", "--features", "32", "--rounds", "2")


def test_the_documented_shares_of_a_peak_are_those_counted() -> None:
    least, most = (f"{100 * share:.0f} %" for share in gram.expected_shares())
    assert f"between {least} and {most} of the peak" in PERFORMANCE.replace("\n", " ")
    assert f"every {gram.PRODUCTS} products a warp issues {gram.OTHERS} other" in PERFORMANCE.replace("\n", " ")


# ---- half.py


def test_half_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"linear": (half.linear, lambda t: [(t, 8), (4, 8)])}
    monkeypatch.setattr(half, "PRODUCTS", small)
    output = tmp_path / "found.json"
    run(half.main, monkeypatch, "--tokens", "16", "--rounds", "2", "--json", output)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["dtype"], row["product"]) for row in rows] == [("bfloat16", "linear"), ("float16", "linear")]
    assert all(len(row["seconds"][who]) == 2 for row in rows for who in ("torch", "ours", "fp32"))
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + len(rows)
    monkeypatch.setattr(half, "Float32Products", Doubling)
    with pytest.raises(SystemExit, match=r"linear in bfloat16 by ours is off by .* nothing is timed"):
        run(half.main, monkeypatch, "--tokens", "16", "--rounds", "2")


class Doubling(TorchDispatchMode):
    """Products twice as large as they should be."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = function(*arguments, **(settings or {}))
        return 2 * result if function is torch.ops.aten.mm.default else result


# ---- initialize.py and low_bits.py


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose linears have room for the rank, and a text."""
    folder = tmp_path_factory.mktemp("job")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    checkpoint = tiny.checkpoint(folder / "model", dtype=torch.bfloat16, **sizes)
    test_training.tokenizer().save_pretrained(checkpoint)
    (folder / "text.txt").write_text("\n".join(test_training.TEXTS))
    return checkpoint, folder / "text.txt"


@pytest.mark.slow
def test_initialize_on_a_cpu(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, text = job
    output = tmp_path / "found.json"
    small = ["--samples", "2", "4", "--sequence-length", "16", "--rounds", "2", "--memory-budget", "500MiB"]
    run(initialize.main, monkeypatch, text, "--model", checkpoint, *small, "--json", output)
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert initialize.table(found) in shown and initialize.solve_table(found) in shown
    assert [(each["samples"], each["length"]) for each in found["runs"]] == [(2, 16), (4, 16)]
    for each in found["runs"]:
        assert {len(each[name]) for name in ("forward", "initialize", "stages", "parts_of_solve")} == {2}
        assert each["floors"].keys() == each["stages"][0].keys() == set(initialize.STAGES)
        assert sum(each["stages"][0].values()) <= each["initialize"][0]
        assert all(0 <= share <= each["stages"][0]["solve"] for share in each["parts_of_solve"][0].values())
        within = each["budgets"]["500MiB"]
        assert len(within["seconds"]) == 2 and "planned peak" in within["plan"]
        # Per block and token 4 x 128² + 3 x 128 x 256 multiply-adds, and half of 3 x 128² + 256² for H.
        assert each["floors"]["H"] == pytest.approx((3 * 128**2 + 256**2) / 2 / (4 * 128**2 + 3 * 128 * 256))


def test_low_bits(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, text = job
    output = tmp_path / "found.json"
    small = ["--bits", "3", "--group-size", "32", "--rank", "4", "--alternations", "0", "1"]
    run(low_bits.main, monkeypatch, text, text, "--model", checkpoint, *small, "--json", output)
    found, shown = json.loads(output.read_text()), capsys.readouterr().out.splitlines()
    names = ["int3 nearest", *(f"int3 calibrated, λ 0.1, alternations {number}" for number in (0, 1))]
    assert list(found["rows"]) == names and len(shown) == 4
    nearest, once, twice = found["rows"].values()
    assert twice["left"] < once["left"] < nearest["left"] < 1
    for row, line in zip(found["rows"].values(), shown[1:], strict=True):
        assert row["quantize"] + row["solve"] <= row["seconds"]
        assert f"{row['seconds'] / found['forward seconds']:.2f} forward passes" in line
    assert low_bits.table(found).count("| int3 ") == 3


def job_record() -> dict[str, Any]:
    """Of two jobs: 3 and 6 bare forward passes, of 2 and 4 s."""

    def entry(samples: int, forward: float, ratio: float) -> dict[str, Any]:
        stages = dict.fromkeys(initialize.STAGES, forward * ratio / 6)
        return {
            "samples": samples,
            "length": 8,
            "forward": [forward, forward],
            "initialize": [forward * ratio, forward * ratio],
            "stages": [stages, stages],
            "parts_of_solve": [{"half": stages["solve"] / 2, "the rest": stages["solve"] / 2}] * 2,
            "budgets": {"1GiB": {"plan": "", "seconds": [7 * forward, 7 * forward]}},
            "floors": dict.fromkeys(initialize.STAGES, 0.25),
        }

    return {"runs": [entry(2, 2.0, 3.0), entry(4, 4.0, 6.0)]}


def test_the_tables_of_a_job() -> None:
    assert initialize.table(job_record()).splitlines() == [
        "| stage | 2 × 8 tokens | floor | 4 × 8 tokens | floor |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(f"| {stage} | 0.50 ± 0 % | 0.25 | 1.00 ± 0 % | 0.25 |" for stage in initialize.STAGES),
        "| **total** | **3.00 ± 0 %** | 1.50 | **6.00 ± 0 %** | 1.50 |",
        "| total, within 1GiB | 7.00 ± 0 % |  | 7.00 ± 0 % |  |",
    ]
    assert initialize.solve_table(job_record()).splitlines()[2:] == ["| half | 50 % |", "| the rest | 50 % |"]
    on_a_gpu = job_record()
    on_a_gpu["runs"][-1]["parts_of_solve"] = [{"half": 0.3, "the rest": 0.1}]  # in a run of its own
    assert initialize.solve_table(on_a_gpu).splitlines()[2:] == ["| half | 75 % |", "| the rest | 25 % |"]


@pytest.mark.slow
def test_an_untrue_report_is_not_timed(job: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    built = quailora.build_adapter

    def flattering(*arguments: Any, **settings: Any) -> Any:
        report = built(*arguments, **settings)
        report.layers = [replace(row, output_error=0.9 * row.output_error) for row in report.layers]
        return report

    monkeypatch.setattr(quailora, "build_adapter", flattering)
    checkpoint, text = job
    with pytest.raises(SystemExit, match=r"the output error, against the report's, is off by 0\.11.* nothing is timed"):
        run(initialize.main, monkeypatch, text, "--model", checkpoint, "--samples", "1", "--sequence-length", "16")


# ---- scaling.py


def test_the_exponent_of_a_power_law() -> None:
    assert scaling.exponent({size: 3e-9 * size**1.7 for size in (10, 20, 50, 400)}) == pytest.approx(1.7)
    assert scaling.exponent({2: 5.0, 8: 5.0}) == pytest.approx(0)


def test_expected_exponents() -> None:
    sizes = (2**20, 2**22)  # beside which everything else is small
    scale = replace(scaling.SCALES["tiny"], length=1)

    def expected(flops: Callable[[int], float]) -> float:
        return scaling.exponent({size: flops(size) for size in sizes})

    assert expected(lambda t: scaling.gram_flops(t, 64)) == pytest.approx(1)
    assert expected(lambda n: scaling.gram_flops(64, n)) == pytest.approx(2, abs=1e-5)
    assert expected(lambda m: solver.krylov_flops(m, 64, 4, 3)) == pytest.approx(1, abs=1e-2)
    assert expected(lambda n: solver.krylov_flops(64, n, 4, 3)) == pytest.approx(2, abs=1e-2)
    assert expected(lambda r: solver.krylov_flops(64, 64, r, 3)) == pytest.approx(3, abs=1e-2)
    assert expected(lambda m: scaling.rounding_flops(m, 64)) == pytest.approx(1, abs=1e-2)
    assert expected(lambda n: scaling.rounding_flops(64, n)) == pytest.approx(3, abs=1e-2)
    assert expected(lambda blocks: scaling.adapter_flops(scale, 4, blocks, 64)) == pytest.approx(1)
    assert expected(lambda t: scaling.adapter_flops(scale, 4, 2, t)) == pytest.approx(1, abs=1e-2)


class Counted(TorchDispatchMode):
    """Adds up the FLOPs of the products and dense decompositions within it; one of fp64 counts for two."""

    flops = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = function(*arguments, **(settings or {}))
        name, first = function.__name__.partition(".")[0], arguments[0] if arguments else None
        if isinstance(first, Tensor) and first.dim() == 2:
            (m, k), twice = first.shape, first.dtype.itemsize // 4
            counts = {
                "mm": lambda: 2 * m * k * arguments[1].shape[1],
                "_linalg_eigh": lambda: 9 * k**3,
            }
            self.flops += twice * counts[name]() if name in counts else 0
        return result


@pytest.fixture
def blocks_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Krylov's blocks are as wide as the rank, all of them are made, and no column comes out zero."""
    monkeypatch.setattr(krylov, "narrow", lambda device: False)
    monkeypatch.setattr(als, "SVD_ENOUGH", 0.0)

    def blocks(bases: Sequence[krylov._Basis], products: Sequence[Tensor]) -> list[Tensor]:
        known = [basis.vectors[:, : basis.size] for basis in bases]
        return reference.grouped_orthonormalize(products, known if bases[0].size else None)

    monkeypatch.setattr(krylov, "_blocks", blocks)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.usefixtures("blocks_as_on_a_gpu")
def test_counted_flops_are_those_made(coarse: bool) -> None:
    m, n, r = 96, 160, 8
    case = solver.Case.draw(solver.Group("one", (m,), n), r, CPU)
    q = case.quantized[0].dequantize()
    with Counted() as energy:  # of all of H here, and counted as that of one triangle
        ops.gram_energy(case.gram, case.originals[0].float())
    with precision.emulated() if coarse else nullcontext(), Counted() as counted:
        quailora.solve(case.originals[0], q, case.gram, r, iterations=3, precision="tf32")
    made = counted.flops - energy.flops + m * n * n
    if coarse:  # of the six products with H and the precise one with Eᵀ the emulation makes two each
        made -= 6 * 2 * n * n * r + 2 * m * n * r
    assert made == pytest.approx(solver.krylov_flops(m, n, r, 3, coarse))


@pytest.mark.slow
def test_scaling_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    run(scaling.main, monkeypatch, "--scale", "tiny", "--json", output)
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert [row["over"] for row in found["rows"]] == ["t", "n", "m", "n", "r", "m", "n", "blocks", "t"]
    for row in found["rows"]:
        assert scaling.line(row) in shown
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in row["seconds"])
        assert min(row["floors"]) > 0
    assert [round(row["expected"], 2) for row in found["rows"][:2]] == [1.0, 1.99]
    assert found["rows"][7]["expected"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("part", "refused"), [("H", "H of"), ("solve", "the objective of a solve"), ("rounding", "the error of")]
)
def test_scaling_times_only_what_is_right(part: str, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if part == "H":
        monkeypatch.setattr(ops, "gram_", lambda h, x, keep=None: h.add_(1.01 * (x.float().T @ x.float())))
        sweeps = scaling.gram_sweeps
    elif part == "rounding":  # what is fed back has the wrong sign
        of = scaling.Curvature.of

        def wrong(h: Tensor, damping: float) -> Any:
            found = of(h, damping)
            return replace(found, factor=2 * torch.eye(len(h)) - found.factor)

        monkeypatch.setattr(scaling.Curvature, "of", wrong)
        sweeps = scaling.rounding_sweeps
    else:
        solve = quailora.solve
        monkeypatch.setattr(quailora, "solve", lambda *a, **k: solve(*a, **({"solver": "svd"} | k)))
        sweeps = scaling.solve_sweeps
    with pytest.raises(SystemExit, match=f"{refused}.* nothing is timed"):
        next(sweeps(scaling.SCALES["tiny"], CPU))


# ---- solver.py


def test_solver_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    run(solver.main, monkeypatch, "--scale", "tiny", "--shapes", "70b", "--rounds", "2", "--json", output)
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    rows = {(row["linears"], row["solver"], row["candidate"]): row for row in found["rows"]}
    on_a_cpu = set(solver.CANDIDATES) - {"fused", "cached"}
    groups = [group.name for group in solver.groups("70b")]
    assert rows.keys() == {(group, name, each) for group in groups for name in solver.COMPARED for each in on_a_cpu}
    assert all(row["seconds"] > 0 and row["floor"] > 0 and row["objective"] > 0 for row in rows.values())
    assert found["missing"].keys() == {"fused", "cached"}
    for name, reason in found["missing"].items():
        assert reason in quailora.backends("cpu")["grouped_error_product"].others["triton"]
        assert f"Not run: {name}. {reason}" in shown
    assert solver.roofline(64, ["70b"]) in shown


@pytest.mark.parametrize("name", solver.COMPARED)
def test_all_candidates_agree_with_fp64(name: str) -> None:
    """On a CPU those of the kernels go the same way, through the reference."""
    solver.check(solver.CANDIDATES, name, 64, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("name", solver.COMPARED)
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


@pytest.mark.usefixtures("blocks_as_on_a_gpu")
@pytest.mark.parametrize("name", solver.COMPARED)
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
        solve_group(linears, case.gram, SolverConfig(name, SOLVERS[name].iterations, damping=0.0))
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
        chosen = SOLVERS[name].precision
        assert most[name, chosen] <= precision.ALLOWED
        if name != "svd":
            coarser = PRECISIONS[PRECISIONS.index(chosen) + 1]
            assert most[name, coarser] > precision.ALLOWED
