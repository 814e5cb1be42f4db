"""Which base an adapter belongs on, and whether a checkpoint, a quantization or a loaded model is that base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, PreTrainedModel

import quailora
from quailora.adapters.base_record import base_of
from quailora.calibration.data import Calibration
from quailora.errors import AdapterError, CheckpointError, MismatchError, QuailoraError
from quailora.evaluate import compare
from quailora.quantization.registry import is_quantized
from quailora.reporting.record import RECORD
from tests.helpers import tiny
from tests.helpers.adapters import dense, train_a_little
from tests.integration import test_pipeline as pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("base") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    pipeline.build(folder, folder.parent / "start")
    return folder.parent / "start"


def load(folder: Path, quantization: BitsAndBytesConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return pipeline.load_base(folder, quantization, dtype)


@pytest.mark.parametrize(
    "kind, family",
    [*((kind, "llama") for kind in pipeline.QUANTIZATIONS), *(("nf4-double", f) for f in ("gpt2", "phi3", "mixtral"))],
)
def test_its_own_base_passes(kind: str, family: str, tmp_path: Path) -> None:
    quantization = pipeline.QUANTIZATIONS[kind]
    folder = tiny.checkpoint(tmp_path / "model", family, torch.bfloat16)
    pipeline.build(folder, tmp_path / "start", quantization=quantization)
    base = load(folder, quantization)
    quailora.check_base(base, tmp_path / "start")
    model = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    quailora.check_base(model, tmp_path / "start")
    train_a_little(tmp_path / "start", tmp_path / "trained")
    quailora.check_base(model, tmp_path / "trained", initial=tmp_path / "start")


@pytest.mark.parametrize(
    "quantization, words",
    [
        (pipeline.four_bits("fp4"), r"q_proj of the model is in another: method NF4 against FP4"),
        (pipeline.four_bits(double=False), r"absmax in 8 bits \(double quantization\) against in fp32"),
        (pipeline.four_bits(compute=torch.bfloat16), r"compute dtype fp32 against bf16"),
        (BitsAndBytesConfig(load_in_8bit=True), r"method NF4 against LLM\.int8"),
    ],
)
def test_another_quantization_is_named(quantization: BitsAndBytesConfig, words: str, folder: Path, start: Path) -> None:
    with pytest.raises(MismatchError, match=words):
        quailora.check_base(load(folder, quantization), start)


def test_a_linear_that_is_not_quantized_is_named(folder: Path, start: Path) -> None:
    quantization = pipeline.four_bits()
    quantization.llm_int8_skip_modules = ["lm_head", "down_proj"]
    with pytest.raises(MismatchError, match=r"has model\.layers\.0\.mlp\.down_proj quantized, .* it in full precision"):
        quailora.check_base(load(folder, quantization), start)
    with pytest.raises(MismatchError, match=r"has model\.layers\..* quantized, .* full precision \(and 13 more"):
        quailora.check_base(dense(folder), start)


def test_a_fine_tune_is_another_base_even_if_it_is_said_to_be_the_checkpoint(
    folder: Path, start: Path, tmp_path: Path
) -> None:
    relative = tiny.checkpoint(tmp_path / "relative", dtype=torch.bfloat16)
    weights = load_file(relative / "model.safetensors")
    moved = {k: (v * (1 + 2e-3 * torch.randn(v.shape))).to(v.dtype) for k, v in weights.items()}
    save_file(moved, relative / "model.safetensors", metadata={"format": "pt"})
    model = load(relative, pipeline.four_bits())
    with pytest.raises(MismatchError, match=r"relative has other weights"):
        quailora.check_base(model, start)
    with pytest.raises(
        MismatchError,
        match=r"q_proj is not the quantized weight of .*model: it is off by .* codes and scales are not the",
    ):
        quailora.check_base(model, start, checkpoint=folder)


def test_the_dtype_that_weights_are_loaded_as_counts_where_it_rounds_them(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")  # fp32
    pipeline.build(folder, tmp_path / "start", dtype=torch.bfloat16)
    quailora.check_base(load(folder, pipeline.four_bits()), tmp_path / "start")
    with pytest.raises(MismatchError, match="another dtype than bfloat16"):
        quailora.check_base(load(folder, pipeline.four_bits(), torch.float32), tmp_path / "start")


def test_a_dtype_that_holds_the_same_weights_is_no_other_base(folder: Path, start: Path) -> None:
    quailora.check_base(load(folder, pipeline.four_bits(), torch.float32), start)


def test_absmax_that_bitsandbytes_rounds_on_some_cpus_is_borne(tmp_path: Path) -> None:
    folder, quantization = tiny.checkpoint(tmp_path / "model"), pipeline.four_bits(double=False)
    pipeline.build(folder, tmp_path / "start", quantization=quantization)
    base = load(folder, quantization, torch.float32)
    for module in base.modules():
        if is_quantized(module):
            state = module.weight.quant_state
            state.absmax = state.absmax.bfloat16().float()
    quailora.check_base(base, tmp_path / "start")


def test_a_converted_adapter_belongs_on_full_precision(folder: Path, start: Path, tmp_path: Path) -> None:
    train_a_little(start, tmp_path / "trained")
    quailora.convert(start, tmp_path / "trained", tmp_path / "converted")
    quailora.check_base(dense(folder), tmp_path / "converted")
    with pytest.raises(MismatchError, match="converted for the full-precision weights, and the model is quantized"):
        quailora.check_base(load(folder, pipeline.four_bits()), tmp_path / "converted")


def test_what_is_missing_is_said(folder: Path, start: Path, tmp_path: Path) -> None:
    base = load(folder, pipeline.four_bits())
    train_a_little(start, tmp_path / "trained")
    with pytest.raises(AdapterError, match=r"trained has no quailora\.json: .* as initial"):
        quailora.check_base(base, tmp_path / "trained")
    with pytest.raises(AdapterError, match="strat does not exist"):
        quailora.check_base(base, start.parent / "strat")
    with pytest.raises(CheckpointError, match="nowhere"):
        quailora.check_base(base, start, checkpoint=tmp_path / "nowhere")


def test_a_digest_decides_only_where_codes_do_not_follow_from_the_weights(
    folder: Path, start: Path, tmp_path: Path
) -> None:
    """Nearest rounding may round ties differently on another device; codes that calibration chose are the recorded."""
    shutil.copytree(start, tmp_path / "adapter")
    record = json.loads((start / "quailora.json").read_text())
    digests = record["base"]["digests"]
    assert len(digests) == 14 and record["base"]["rounding"] == "nearest"
    codes, scales = digests["model.layers.1.mlp.up_proj"].split("-")
    digests["model.layers.1.mlp.up_proj"] = f"{codes[::-1]}-{scales}"
    held_out = Calibration(tiny.sequences(2), "held out", 0)

    def use() -> None:
        quailora.check_base(load(folder, pipeline.four_bits()), tmp_path / "adapter")
        quailora.merge(folder, tmp_path / "adapter", tmp_path / f"merged-{record['base']['rounding']}")
        compare(folder, tmp_path / "adapter", held_out, device="cpu")

    (tmp_path / "adapter" / "quailora.json").write_text(json.dumps(record))
    use()
    record["base"]["rounding"] = "calibrated"
    (tmp_path / "adapter" / "quailora.json").write_text(json.dumps(record))
    said = r"layers\.1\.mlp\.up_proj is another quantized weight: its codes are not the recorded ones"
    with pytest.raises(MismatchError, match=said):
        quailora.check_base(load(folder, pipeline.four_bits()), tmp_path / "adapter")
    said = r"chosen by calibration, so they cannot be computed from the full-precision weights: .*\(--base\)"
    with pytest.raises(AdapterError, match=said):
        quailora.merge(folder, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(AdapterError, match=said):
        compare(folder, tmp_path / "adapter", held_out, device="cpu")


def test_another_base_is_refused_by_eval_merge_and_initialize(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    pipeline.build(folder, tmp_path / "adapter")
    fp4 = pipeline.QUANTIZATIONS["fp4"]

    with pytest.raises(MismatchError, match="fingerprint"):
        quailora.merge(other, tmp_path / "adapter", tmp_path / "dense")
    with pytest.raises(MismatchError, match=r"NF4.*FP4"):
        quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense", quantization=fp4)
    with pytest.raises(MismatchError, match="fingerprint"):
        compare(other, tmp_path / "adapter", pipeline.DATA)
    with pytest.raises(MismatchError, match=r"NF4.*FP4"):
        compare(folder, tmp_path / "adapter", pipeline.DATA, quantization=fp4)
    model = get_peft_model(pipeline.load_base(folder, pipeline.four_bits()), pipeline.lora())
    with pytest.raises(MismatchError, match="is not the quantized weight of"):
        quailora.initialize(model, pipeline.DATA, checkpoint=other, progress=False)
    assert not (tmp_path / "dense").exists()


def test_a_trainers_checkpoint_below_the_adapter_is_known_by_the_folder_above(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    train_a_little(tmp_path / "adapter", tmp_path / "adapter" / "checkpoint-10")
    quailora.merge(folder, tmp_path / "adapter" / "checkpoint-10", tmp_path / "dense")


def test_an_adapter_of_unknown_base_is_refused_unless_its_base_is_named(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    train_a_little(tmp_path / "adapter", tmp_path / "trained")
    with pytest.raises(AdapterError, match=RECORD):
        quailora.merge(folder, tmp_path / "trained", tmp_path / "dense")
    quailora.merge(folder, tmp_path / "trained", tmp_path / "dense", quantization=pipeline.four_bits())


def test_a_damaged_record_is_an_error_not_an_absent_one(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD).write_text(json.dumps({"base": {}}))
    with pytest.raises(QuailoraError, match=RECORD):
        quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense")


def test_the_start_that_is_named_counts_more_than_the_folder_above(tmp_path: Path) -> None:
    folder, fp4 = tiny.checkpoint(tmp_path / "model"), pipeline.QUANTIZATIONS["fp4"]
    pipeline.build(folder, tmp_path / "above")
    pipeline.build(folder, tmp_path / "start", quantization=fp4)
    trained = tmp_path / "above" / "trained"
    train_a_little(tmp_path / "start", trained)
    assert base_of(trained) != base_of(trained, tmp_path / "start") == base_of(tmp_path / "start")
    for missing, words in ((tmp_path / "strat", "does not exist"), (folder, f"has no {RECORD}")):
        with pytest.raises(AdapterError, match=words):
            quailora.merge(folder, trained, tmp_path / "dense", initial=missing, quantization=fp4)
