"""The study of bases: its dense twin is the quantized model, and its tables say what was recorded."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quailora
from benchmarks.common import plots
from benchmarks.common.layers import gather
from benchmarks.paper import bases, claims
from benchmarks.paper.bases import Choice, Trained, best_rates, best_table, dense_twin, rounding_table
from benchmarks.paper.initializations import BASES
from benchmarks.paper.paper import provide, write_texts
from benchmarks.paper.study import ONE_BLOCK
from quailora.calibration.data import Calibration
from quailora.files import to_json, write_files
from quailora.modeling.checkpoint import Checkpoint
from tests.helpers import tiny


@pytest.fixture
def small_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "RANK", 8)
    monkeypatch.setattr(bases, "LORA_ALPHA", 2)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """In training mode, where bitsandbytes on a CPU multiplies with Q itself."""
    model.train()
    with torch.no_grad():
        return model(input_ids=torch.stack([s[:8] for s in tiny.sequences(seed=1)])).logits.float()


@pytest.mark.usefixtures("small_rank")
def test_the_dense_twin_is_the_quantized_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16))
    made = Choice("nf4").make(gather(checkpoint, Calibration(tiny.sequences(), "random tokens")))
    quantized = AutoModelForCausalLM.from_pretrained(
        checkpoint.name, dtype=torch.bfloat16, quantization_config=BASES["nf4"], device_map="cpu"
    )
    zero, ours = (dense_twin(checkpoint, made, Choice("nf4", kind), 0) for kind in ("zero", "quailora"))
    expected = logits(quantized)
    # Both round to bf16 after every layer, in another order.
    assert (logits(zero) - expected).norm() < 1e-2 * expected.norm()
    full = logits(AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=torch.bfloat16))
    assert (logits(ours) - full).norm() < 0.8 * (expected - full).norm()


@pytest.mark.usefixtures("small_rank")
def test_every_way_begins_with_the_same_product_and_trains_its_own_part(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.checkpoint(tmp_path / "model"))
    made = Choice("nf4").make(gather(checkpoint, Calibration(tiny.sequences(), "random tokens")))
    expected = logits(dense_twin(checkpoint, made, Choice("nf4"), 0))
    for kind, rank in (("matched", 8), ("frozen-8+4", 4)):
        model = dense_twin(checkpoint, made, Choice("nf4", kind), 0)
        assert (logits(model) - expected).norm() < 1e-2 * expected.norm()
        trained = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name]
        assert {len(parameter) for parameter in trained} == {rank}


@pytest.mark.slow
@pytest.mark.usefixtures("small_rank")
def test_what_build_adapter_makes_is_what_is_made_from_w_and_h(tmp_path: Path) -> None:
    """The files hold the same Q and A Bᵀ, and balanced factors."""
    checkpoint, data = (
        Checkpoint(tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)),
        Calibration(tiny.sequences(), ""),
    )
    for choice in (Choice("nf4"), replace(bases.FULL_INPUTS, base="int3")):
        made, built = choice.make(gather(checkpoint, data)), choice.build(checkpoint, data)
        assert made.keys() == built.keys()
        for name, each in made.items():
            other = built[name]
            assert each.factors is not None and other.factors is not None
            torch.testing.assert_close(other.quantized.dequantize(), each.quantized.dequantize())
            found, expected = (factors.A @ factors.B.T for factors in (other.factors, each.factors))
            assert (found - expected).norm() < 1e-2 * expected.norm()  # activations are bf16, in other batches
            torch.testing.assert_close(other.factors.A.norm(), other.factors.B.norm(), rtol=1e-3, atol=0)


def record(folder: Path, run: Trained, before: float, after: float) -> None:
    values = {"run": asdict(run), "before": before, "after": after, "losses": []}
    write_files(folder, {f"{run.slug}.json": to_json(values)})


def test_tables_take_the_best_rate_of_the_first_seed(tmp_path: Path) -> None:
    choice = Choice("nf4")
    for rate, seed, after in ((5e-4, 0, 9.0), (1e-3, 0, 8.0), (2e-3, 0, 8.5), (1e-3, 1, 8.2)):
        record(tmp_path, Trained("roleplay", choice, rate, seed), 21.0, after)
    zero = replace(choice, initialization="zero")
    record(tmp_path, Trained("roleplay", zero, 2e-3, 0), 26.0, 10.0)
    assert best_rates(bases._records(tmp_path, "initialization"), 0) == {
        ("roleplay", choice): 1e-3,
        ("roleplay", zero): 2e-3,
    }
    drawn = best_table(tmp_path, "initialization")
    assert "| 4 (NF4) | nearest | QuAILoRA | 0.001 | 21.0 ± 0.0 | 8.100 ± 0.141 |" in drawn
    assert "| 4 (NF4) | nearest | zero (QLoRA) | 0.002 * | 26.0 | 10.000 |" in drawn
    assert rounding_table(tmp_path) == "Not run yet."


def record_by_bits(folder: Path, ends: dict[str, tuple[float, float, float]]) -> None:
    """Base -> perplexity from zero, with factors on nearest codes, and on calibrated ones."""
    record(folder, Trained("roleplay", Choice("bf16", "zero"), 4e-3, 0), 20.0, 8.0)
    for base, (zero, nearest, calibrated) in ends.items():
        record(folder, Trained("roleplay", Choice(base, "zero"), 4e-3, 0), 30.0, zero)
        record(folder, Trained("roleplay", Choice(base), 1e-3, 0), 22.0, nearest)
        for choice in (replace(bases.FULL_INPUTS, alternations=0), bases.CALIBRATED_DEFAULT):
            record(folder, Trained("roleplay", replace(choice, base=base), 1e-3, 0), 22.0, calibrated)


def test_claims_and_plot_by_bits_compare_with_16_bits(tmp_path: Path) -> None:
    small, folder = tmp_path / "small", tmp_path / "bases"
    assert {claim(small).verdict for claim in claims.CLOQ} == {claims.NOT_RUN, claims.UNTESTABLE}
    assert plots.bits(small) is None
    record_by_bits(folder, {"nf4": (8.5, 8.2, 8.1), "int3": (11.0, 9.0, 8.8), "int2": (40.0, 13.0, 12.0)})
    zero, other = bases.excess(folder, [Choice("int3", "zero"), Choice("int2-asymmetric")], "roleplay")
    assert zero == pytest.approx(math.log(11 / 8))
    assert other is None
    assert claims.ahead_at_few_bits(small).verdict == claims.REPRODUCED
    found = claims.most_at_two_bits(small)
    assert (found.verdict, found.found) == (
        claims.REPRODUCED,
        f"by {math.log(8.5 / 8.1):.3f} nats at 4 (NF4), {math.log(11 / 8.8):.3f} nats at 3, "
        f"{math.log(40 / 12):.3f} nats at 2",
    )
    figure = plots.bits(small)
    assert figure is not None
    assert figure.axes[0].lines[0].get_ydata()[2] == pytest.approx(math.log(40 / 8))  # type: ignore[index]
    record_by_bits(folder, {"int2": (12.5, 13.0, 12.6)})
    assert [claim(small).verdict for claim in claims.CLOQ[:2]] == [claims.NOT, claims.NOT]


@pytest.mark.slow
def test_it_runs_at_the_scale_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data,), _ = write_texts(tmp_path / "texts")
    runs = [(Choice("int3"), 1e-3), (Choice("int3", "zero"), 1e-3), (Choice("int3", "frozen-8+8"), 1e-3)]
    others = dict.fromkeys(("rounding", "training"), lambda: iter(()))
    monkeypatch.setattr(bases, "EXPERIMENTS", {"initialization": lambda: iter(runs), **others})
    words = [
        "--data",
        data,
        "--scale",
        "tiny",
        "--model",
        provide(ONE_BLOCK, tmp_path),
        "--results",
        tmp_path / "results",
    ]
    monkeypatch.setattr("sys.argv", ["bases.py", *map(str, words)])
    bases.main()
    assert len(list((tmp_path / "results").glob("*.json"))) == 6
    assert quailora.__version__ in next((tmp_path / "results").glob("*.json")).read_text()
