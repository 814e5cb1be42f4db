"""`refine`: the quantized model trained as a whole for what the full-precision one predicts, one after the other."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig

import quailora
from quailora.calibration.data import Calibration
from quailora.errors import (
    AdapterError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    MismatchError,
    NotFiniteError,
    QuailoraError,
)
from quailora.memory.allocator import overhead
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline import refine as pipeline
from quailora.pipeline import trainable
from quailora.refinement import model as refinement
from quailora.refinement.config import BLOCKS_INSTEAD, RefinementConfig
from quailora.refinement.student import Student
from quailora.reporting.record import RECORD
from quailora.reporting.report import ModelReport, Report
from tests.helpers import tiny
from tests.helpers.adapters import WEIGHTS, train_a_little
from tests.integration.test_pipeline import build, four_bits, load_base, lora

# Of a few tokens only, and starts that are not calibrated, so that a few steps help on held-out sequences.
DATA = Calibration(tuple(2 + sequence % 8 for sequence in tiny.sequences(40, seed=5)), "random tokens")
MADE: dict[str, Any] = {"data": DATA, "solver": "svd"}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("refinement") / "model")


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """One made layer by layer."""
    build(folder, folder.parent / "adapter", **MADE)
    return folder.parent / "adapter"


def refine(adapter: Path, output: Path, data: Any = DATA, **options: Any) -> Report:
    return quailora.refine(adapter, data, output, **{"steps": 4, "rate": 3e-3, "progress": False} | options)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of about 96 tokens, and measured often."""
    init: Any = RefinementConfig.__init__
    small = {"tokens": 96, "every": 2, "warmup": 1, "held_out": 4}
    monkeypatch.setattr(
        RefinementConfig, "__init__", lambda self, *args, **given: init(self, *args, **{**given, **small})
    )


def held_out() -> list[Tensor]:
    order = torch.randperm(len(DATA), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = 4 * (96 // DATA.longest)  # of four steps
    return [DATA.sequences[i][None] for i in order[: (sequences + sequences // 4) // 5]]


def test_the_report_has_the_divergence_of_the_loaded_model(folder: Path, adapter: Path, tmp_path: Path) -> None:
    before, drawn = (adapter / WEIGHTS).read_bytes(), torch.get_rng_state()
    report = refine(adapter, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), drawn)
    row = report.model
    assert row is not None and row.steps > 0 and row.kl_after < row.kl
    assert row.tokens == sum(sequence.shape[1] - 1 for sequence in held_out())

    full: Any = AutoModelForCausalLM.from_pretrained(folder)
    for output, expected in ((adapter, row.kl), (tmp_path / "out", row.kl_after)):
        loaded = PeftModel.from_pretrained(load_base(folder, four_bits()), str(output))
        assert quailora.evaluate.kl_divergence(loaded, full, held_out()) == pytest.approx(expected, rel=1e-3)
        quailora.check_base(loaded, output)

    assert (adapter / WEIGHTS).read_bytes() == before
    names = list(load_file(adapter / WEIGHTS))
    assert list(load_file(tmp_path / "out" / WEIGHTS)) == names
    loaded_report = Report.load(tmp_path / "out")
    assert loaded_report.model == row and loaded_report.layers == Report.load(adapter).layers
    settings = report.record["model_refinement"]
    assert settings["steps"] == 4 and settings["sequences"] == 40
    assert row.tokens < settings["drawn_tokens"] < settings["data_tokens"] == DATA.tokens
    assert row.seconds == sum(report.stages[stage] for stage in ("full precision", "load the base", "refine the model"))
    assert "The whole model refined; KL" in str(report.summary()) and "## The whole model" in report.to_markdown()
    assert pipeline._initialized(tmp_path / "out") == report.record  # with the digest of its own weights
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Then all factors were trained together, on random tokens" in card
    assert "trained together" not in (adapter / "README.md").read_text()


@pytest.mark.slow
def test_the_two_models_are_never_in_memory_together(adapter: Path, tmp_path: Path) -> None:
    """While the base is loaded and trained, no weight of the full-precision one is."""
    streams: list[StreamedModel] = []
    init, load, train = StreamedModel.__init__, pipeline.load_model, pipeline.refine_model

    def opened(self: StreamedModel, *args: Any) -> None:
        streams.append(self)
        init(self, *args)

    def checked(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            assert streams and all(p.is_meta for stream in streams for p in stream.model.parameters())
            return function(*args, **kwargs)

        return run

    with (
        mock.patch.object(StreamedModel, "__init__", opened),
        mock.patch.object(pipeline, "load_model", checked(load)),
        mock.patch.object(pipeline, "refine_model", checked(train)),
    ):
        refine(adapter, tmp_path / "out", steps=1)


def test_where_nothing_does_better_the_factors_stay_what_they_were(adapter: Path, tmp_path: Path) -> None:
    report = refine(adapter, tmp_path / "out", rate=100.0)
    assert report.model is not None and report.model.steps == 0 and report.model.kl_after == report.model.kl
    assert any("no step of refinement did better" in note for note in report.notes)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def spy_on_losses(monkeypatch: pytest.MonkeyPatch, planted: int | None = None) -> list[int]:
    """The batches that training takes; the loss of number `planted` is NaN."""
    seen: list[int] = []
    compute = refinement._Trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(int(inputs["number"]))
        if len(seen) - 1 == planted:
            with mock.patch.object(Student, "kl", lambda *args: torch.tensor(float("nan"))):
                return compute(self, model, inputs, *args, **kwargs)
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(refinement._Trainer, "compute_loss", compute_loss)
    return seen


def test_a_loss_that_is_not_finite_ends_it_with_the_best_until_then(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy_on_losses(monkeypatch, planted=2)
    report = refine(adapter, tmp_path / "out", batch_size=4)
    assert report.model is not None
    assert report.model.stopped == "the loss was not finite in step 3"
    assert "the loss was not finite in step 3, and the factors are those of step 2" in report.notes
    assert report.model.kl_after < report.model.kl
    assert load_file(tmp_path / "out" / WEIGHTS)[KEY].isfinite().all()


@pytest.mark.slow
def test_held_out_sequences_are_not_trained_on(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_losses(monkeypatch)
    refine(adapter, tmp_path / "out", batch_size=1)
    assert len(seen) == 4 * (96 // DATA.longest)  # micro-batches of four steps
    assert len(set(seen)) == len(seen) and min(seen) == len(held_out())


@pytest.mark.slow
def test_micro_batches_change_nothing(adapter: Path, tmp_path: Path) -> None:
    """A token counts the same in each, however long their sequences are."""
    data = Calibration(DATA.sequences[:5], "four to train on")
    assert len({len(sequence) for sequence in data.sequences}) > 2
    step, gradients = torch.optim.Adam.step, []

    def spy(self: torch.optim.Adam, closure: Any = None) -> Any:
        gradients.append(self.param_groups[0]["params"][0].grad.clone())
        return step(self, closure)

    with mock.patch.object(torch.optim.Adam, "step", spy):
        for size in (4, 1):
            refine(adapter, tmp_path / str(size), data, steps=1, batch_size=size)
    whole, ones = gradients
    assert (whole - ones).norm() < 1e-3 * whole.norm()


def test_the_rate_is_a_share_of_the_size_of_the_factors(adapter: Path, tmp_path: Path) -> None:
    shares = []

    def spy(self: torch.optim.Adam, closure: Any = None) -> None:
        for group in self.param_groups:
            a, b = (side.detach().flatten() for side in group["params"])
            shares.append(group["initial_lr"] / float(torch.cat([a, b]).square().mean().sqrt()))

    with mock.patch.object(torch.optim.Adam, "step", spy):
        refine(adapter, tmp_path / "out", steps=1, rate=0.02)
    assert shares == pytest.approx([0.02] * len(shares)) and shares


def test_a_divergence_that_is_not_finite_to_begin_with(adapter: Path, tmp_path: Path) -> None:
    nan = mock.patch.object(Student, "held_out", lambda self: float("nan"))
    with nan, pytest.raises(NotFiniteError, match="KL divergence of the quantized model"):
        refine(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- bad input


def test_a_base_without_a_gradient_is_an_error(adapter: Path, tmp_path: Path) -> None:
    raising = mock.patch(
        "bitsandbytes.nn.modules.Linear4bit.forward", side_effect=NotImplementedError("no autograd here"), autospec=True
    )
    with raising, pytest.raises(AdapterError) as error:
        refine(adapter, tmp_path / "out")
    for words in ("no gradient reaches model.layers.0.self_attn.q_proj", "(Linear4bit) on cpu", "no autograd here",
                  f"use another device (--device), or {BLOCKS_INSTEAD}"):  # fmt: skip
        assert words in str(error.value)


def test_a_quantized_head_is_an_error(adapter: Path, tmp_path: Path) -> None:
    with mock.patch.object(trainable, "is_quantized", lambda module: True), pytest.raises(AdapterError) as error:
        refine(adapter, tmp_path / "out")
    assert f"leave lm_head in full precision, or {BLOCKS_INSTEAD}" in str(error.value)


def test_a_model_that_does_not_fit(folder: Path, adapter: Path, tmp_path: Path) -> None:
    said = r"refining the whole model takes .*base .*activations .*overhead .* refine='blocks'"
    with pytest.raises(BudgetError, match=said):
        refine(adapter, tmp_path / "out", memory_budget=2**18)
    with pytest.raises(BudgetError, match=said):  # before anything is computed
        build(folder, tmp_path / "out", **MADE, refine="model", memory_budget=2**18)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_micro_batches_are_as_large_as_fit(adapter: Path, tmp_path: Path) -> None:
    sizes = []
    for budget in (None, 900_000 + overhead(900_000, torch.device("cpu"))):
        with mock.patch.object(pipeline.Sequences, "of", wraps=pipeline.Sequences.of) as of:
            refine(adapter, tmp_path / str(budget), steps=1, memory_budget=budget)
        sizes.append(of.call_args.args[2])
    assert sizes == [96 // DATA.longest, 2]


def test_another_checkpoint_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tiny.checkpoint(tmp_path / "other", hidden_size=128)
    with pytest.raises(MismatchError, match="has other weights"):
        refine(adapter, tmp_path / "out", checkpoint=other)


def test_another_base_is_refused(folder: Path, adapter: Path, tmp_path: Path) -> None:
    load = pipeline.load_model

    def load_fp4(source: Any, device: Any, dtype: Any, quantization: Any) -> Any:
        return load(source, device, dtype, four_bits("fp4", double=False))

    with mock.patch.object(pipeline, "load_model", load_fp4), pytest.raises(MismatchError, match="is in another"):
        refine(adapter, tmp_path / "out")


def test_only_an_adapter_as_it_was_made(adapter: Path, tmp_path: Path) -> None:
    train_a_little(adapter, tmp_path / "trained")
    with pytest.raises(
        AdapterError, match=r"trained has no quailora.json: refine takes an adapter as quailora made it"
    ):
        refine(tmp_path / "trained", tmp_path / "out")
    with pytest.raises(AdapterError, match="does not exist"):
        refine(tmp_path / "nothing", tmp_path / "out")


def test_an_adapter_that_was_trained_in_its_own_folder_is_refused(adapter: Path, tmp_path: Path) -> None:
    train_a_little(adapter, tmp_path / "trained")
    shutil.copytree(adapter, in_place := tmp_path / "in_place")
    shutil.copy(tmp_path / "trained" / WEIGHTS, in_place)
    with pytest.raises(AdapterError, match=r"was trained since quailora made it.* Give the initialized adapter"):
        refine(in_place, tmp_path / "out")
    record = json.loads((in_place / RECORD).read_text())
    (in_place / RECORD).write_text(json.dumps({key: value for key, value in record.items() if key != "weights"}))
    assert pipeline._initialized(in_place)  # older records do not say


def test_the_output_is_not_within_the_adapter(adapter: Path) -> None:
    with pytest.raises(QuailoraError, match=r"output_dir \(--output\) .* is inside the adapter's folder"):
        refine(adapter, adapter / "refined")


def test_a_checkpoint_that_was_moved_is_to_be_given(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, lost := tmp_path / "adapter")
    record = json.loads((lost / RECORD).read_text())
    record["base"]["checkpoint"] = str(tmp_path / "gone")
    (lost / RECORD).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"gone.* if it is elsewhere, give checkpoint \(--checkpoint\)"):
        refine(lost, tmp_path / "out")


def test_what_it_needs_is_checked_before_a_run_that_ends_with_it(folder: Path, tmp_path: Path) -> None:
    missing = mock.patch.object(trainable, "check_libraries", side_effect=ImportError("it takes gptqmodel"))
    gptq = GPTQConfig(bits=3, group_size=32, desc_act=False)
    with (
        missing,
        pytest.raises(QuailoraError, match=r"int3, .* cannot be loaded here: it takes gptqmodel. Or refine bl"),
    ):
        build(folder, tmp_path / "out", **MADE, quantization=gptq, base_output=tmp_path / "base", refine="model")
    broken = mock.patch("bitsandbytes.nn.modules.Linear4bit.forward", side_effect=NotImplementedError("no autograd"))
    with broken, pytest.raises(AdapterError, match=r"no gradient reaches .*q_proj .*: no autograd"):
        build(folder, tmp_path / "out", **MADE, refine="model")
    several = mock.patch.object(trainable, "launched_by_torchrun", return_value=True)
    with several, pytest.raises(QuailoraError, match="run it in one process"):
        build(folder, tmp_path / "out", **MADE, refine="model")
    assert list(tmp_path.iterdir()) == []


def test_the_base_that_was_used_is_named(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "adapter", **MADE, base_output=tmp_path / "base", rounding="nearest")
    shutil.move(tmp_path / "base", moved := tmp_path / "moved")
    with mock.patch.object(pipeline, "refine_model", return_value=ModelReport(8, 2.0, 1.0, 2, "", 1.0)):
        refine(tmp_path / "adapter", tmp_path / "out", base=moved)
    config, record = (json.loads((tmp_path / "out" / name).read_text()) for name in ("adapter_config.json", RECORD))
    assert config["base_model_name_or_path"] == record["base"]["path"] == str(moved)
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(moved) in card and f"{tmp_path}/base" not in card


def test_too_little_data(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="at least 2 sequences"):
        refine(adapter, tmp_path / "out", Calibration(DATA.sequences[:1], "little"))


def test_a_loaded_model_is_not_refined_in_place(folder: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(load_base(folder, four_bits()), lora())
    with pytest.raises(QuailoraError, match=r"save_pretrained, and Report.save .* quailora.refine"):
        quailora.initialize(model, DATA, checkpoint=folder, refine="model", progress=False)


# ---- within a run


@pytest.mark.slow
def test_a_run_refines_what_it_has_made(folder: Path, adapter: Path, tmp_path: Path) -> None:
    """As in two commands."""
    report = build(folder, tmp_path / "out", **MADE, refine="model", refine_steps=4, refine_rate=3e-3)
    refine(adapter, tmp_path / "expected")
    assert report.model is not None and report.model.steps > 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "expected"}
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "expected"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_fails_in_refinement_leaves_the_adapter(folder: Path, adapter: Path, tmp_path: Path) -> None:
    nan = mock.patch.object(Student, "held_out", lambda self: float("nan"))
    said = r"out has the adapter as it was found layer by layer, and quailora.refine \(quailora refine\) goes on"
    with nan, pytest.raises(NotFiniteError, match=said):
        build(folder, tmp_path / "out", **MADE, refine="model")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interruption_while_folders_change_places_leaves_the_adapter(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "out")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "refined":
            raise KeyboardInterrupt
        return rename(path, target)

    with (
        mock.patch("quailora.pipeline.refine.refine", lambda source, data, output: output.mkdir()),
        mock.patch.object(Path, "rename", interrupted),
        pytest.raises(KeyboardInterrupt, match="out has the adapter as it was found"),
    ):
        pipeline.refine_in_place(tmp_path / "out", Calibration(tiny.sequences(), ""))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "mixtral", "opt"])
def test_families(family: str, tmp_path: Path) -> None:
    """Whatever stands between the last block and the logits: norms, a capped softmax, blocks that return tuples."""
    folder = tiny.checkpoint(tmp_path / "model", family)
    build(folder, tmp_path / "adapter", **MADE)
    row = refine(tmp_path / "adapter", tmp_path / "out").model
    full: Any = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(load_base(folder, four_bits()), str(tmp_path / "out"))
    assert row is not None and row.steps > 0
    assert quailora.evaluate.kl_divergence(loaded, full, held_out()) == pytest.approx(row.kl_after, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "calibrated"])
def test_a_base_that_was_written(rounding: str, folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "adapter", **MADE, base_output=tmp_path / "base", rounding=rounding)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    report = refine(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "moved")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "moved", device_map="cpu"), str(tmp_path / "out")
    )
    full: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert report.model is not None and (report.model.steps > 0 or rounding == "calibrated")  # already good
    divergence = quailora.evaluate.kl_divergence(loaded, full, held_out())
    assert divergence == pytest.approx(report.model.kl_after, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_other_bases(kind: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    quantization = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else four_bits(compute=dtype)
    folder = tiny.checkpoint(tmp_path / "model", dtype=dtype)
    build(folder, tmp_path / "adapter", **MADE, quantization=quantization)
    row = refine(tmp_path / "adapter", tmp_path / "out", steps=8).model
    assert row is not None and row.kl_after <= row.kl and not row.stopped


@pytest.mark.slow
def test_blocks_and_then_the_model(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "blocks", **MADE, refine="blocks", refine_steps=2)
    report = refine(tmp_path / "blocks", tmp_path / "out", steps=2)
    assert len(report.blocks) == 2 and report.model is not None
    record = json.loads((tmp_path / "out" / "quailora.json").read_text())
    assert record["refinement"]["level"] == "blocks" and record["model_refinement"]["level"] == "model"
    assert "Last all factors were trained together" in (tmp_path / "out" / "README.md").read_text()
