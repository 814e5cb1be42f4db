"""A quantized base that is written next to its adapter: GPTQ's format, and bitsandbytes' with calibrated codes."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig

import quailora
from quailora.adapters import quantized_checkpoint
from quailora.adapters.quantized_checkpoint import QuantizedCheckpoint
from quailora.calibration.data import load_calibration
from quailora.errors import AdapterError, CheckpointError, MismatchError, QuailoraError
from quailora.evaluate import compare
from quailora.modeling.blocks import linear_weight
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline import base_output
from quailora.quantization.registry import is_quantized, read
from quailora.reporting.record import read_record
from quailora.reporting.report import Report
from tests.helpers import tiny

RANK = 4
INT3 = GPTQConfig(bits=3, group_size=32, sym=True, desc_act=False)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("base-output") / "model", dtype=torch.bfloat16)


def build(model: Path, folder: Path, quantization: Any = INT3, **settings: Any) -> Report:
    config = LoraConfig(r=RANK, target_modules=settings.pop("target_modules", "all-linear"), task_type="CAUSAL_LM")
    return quailora.build_adapter(
        model,
        config,
        settings.pop("calibration", tiny.sequences()),
        folder / "start",
        quantization=quantization,
        **({"base_output": folder / "base", "device": "cpu", "progress": False} | settings),
    )


def dense(model: Path, folder: Path) -> Any:
    """The full-precision model with Q of the written base in place of W."""
    record = read_record(folder / "start")
    assert record is not None
    written = QuantizedCheckpoint.recorded(record["base"])
    assert written is not None
    found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    stream = StreamedModel(Checkpoint(model), torch.device("cpu"), torch.bfloat16)
    for name in written.names:
        found.get_submodule(name).weight.data = written.weight(name, stream).dequantize()
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(torch.stack([torch.arange(2, 22), torch.arange(30, 50)])).logits.float()
    return found


def test_a_gptq_base_is_an_ordinary_checkpoint(model: Path, tmp_path: Path) -> None:
    report = build(model, tmp_path)
    base = tmp_path / "base"
    config = json.loads((base / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq" and config["quantization_config"]["bits"] == 3
    assert config["quantization_config"]["block_name_to_quantize"] == "model.layers"
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: tensor for path in base.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert weight_map.keys() == tensors.keys() and set(weight_map.values()) == {
        path.name for path in base.glob("*.safetensors")
    }
    full = load_file(model / "model.safetensors")
    linears = {name.removesuffix(".weight") for name in full if "proj" in name}
    assert {name for name in tensors if name in full} == {name for name in full if "proj" not in name}
    assert all(torch.equal(tensors[name], full[name]) for name in tensors if name in full)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    assert {name for name in tensors if name not in full} == {f"{name}.{part}" for name in linears for part in parts}
    adapter = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base.resolve()) and adapter["revision"] is None
    assert isinstance(adapter["target_modules"], list)
    assert report.record["base"]["rounding"] == "calibrated" and len(report.record["base"]["digests"]) == len(linears)
    assert all(len(layer.alternations) == 3 for layer in report.layers)
    assert "GPTQ int3, groups of 32, symmetric" in (base / "README.md").read_text()


def test_alternations_and_calibration_leave_less(model: Path, tmp_path: Path) -> None:
    left = {}
    for name, settings in {
        "nearest": {"rounding": "nearest"},
        "calibrated": {"alternations": 0},
        "alternated": {"alternations": 3},
    }.items():
        left[name] = build(model, tmp_path / name, **settings)
    for nearest, calibrated, alternated in zip(*(report.layers for report in left.values()), strict=True):
        assert calibrated.output_error <= nearest.output_error  # alone, calibrated codes are never worse
        assert alternated.output_error_after <= calibrated.output_error_after
        assert alternated.output_error_after == min(after for _, after in alternated.alternations)
    assert left["alternated"].error_left < left["nearest"].error_left


def test_the_adapter_undoes_the_error_of_the_base_that_was_written(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path)
    full = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16))
    quantized = dense(model, tmp_path)
    alone = logits(quantized)
    adapted = logits(PeftModel.from_pretrained(quantized, tmp_path / "start"))
    assert (adapted - full).norm() < 0.9 * (alone - full).norm()  # rank 4 of 64 random directions


def test_merge_and_eval_read_the_written_base(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path)
    adapted = PeftModel.from_pretrained(dense(model, tmp_path), tmp_path / "start")
    expected = logits(adapted.merge_and_unload())
    quailora.merge(model, tmp_path / "start", tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16))
    torch.testing.assert_close(merged, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())  # bf16 weights
    data = load_calibration(tiny.sequences(seed=7), vocab_size=tiny.VOCABULARY)
    comparison = compare(model, tmp_path / "start", data, device="cpu")
    assert comparison.quantized.name == "int3" and comparison.adapted is not None
    assert comparison.adapted.kl < comparison.quantized.kl


def test_eval_of_a_written_base_whose_linears_are_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D."""
    checkpoint = tiny.checkpoint(tmp_path / "model", "gpt2", dtype=torch.bfloat16)
    build(checkpoint, tmp_path, NF4)
    data = load_calibration(tiny.sequences(seed=7), vocab_size=tiny.VOCABULARY)
    comparison = compare(checkpoint, tmp_path / "start", data, device="cpu")
    assert comparison.adapted is not None and comparison.adapted.kl < comparison.quantized.kl


def test_a_base_that_has_moved_is_named_and_another_is_refused(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"is not at .*base: .*--base"):
        quailora.merge(model, tmp_path / "start", tmp_path / "merged")
    quailora.merge(model, tmp_path / "start", tmp_path / "merged", base=tmp_path / "moved")
    shard = tmp_path / "moved" / "model-block-0001.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.qweight"][0, 0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"layers.1.mlp.up_proj.* is not the weight"):
        quailora.merge(model, tmp_path / "start", tmp_path / "again", base=tmp_path / "moved")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_calibrated_4_bits_load_through_transformers_and_bitsandbytes(
    kind: str, double: bool, model: Path, tmp_path: Path
) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    report = build(model, tmp_path, config)
    nearest = build(model, tmp_path / "nearest", config, rounding="nearest")
    for mine, theirs in zip(report.layers, nearest.layers, strict=True):
        assert mine.output_error <= theirs.output_error and mine.digest != theirs.digest
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    expected = dense(model, tmp_path)
    held = {name: module for name, module in loaded.named_modules() if is_quantized(module)}
    assert held.keys() == report.record["base"]["digests"].keys()
    for name, module in held.items():
        assert torch.equal(read(module).dequantize(), expected.get_submodule(name).weight)  # bit for bit
    quailora.check_base(loaded, tmp_path / "start")
    adapted = PeftModel.from_pretrained(loaded, tmp_path / "start", is_trainable=True)
    adapted(input_ids=torch.arange(2, 22)[None], labels=torch.arange(2, 22)[None]).loss.backward()
    with pytest.raises(MismatchError, match="other codes"):
        quailora.check_base(
            AutoModelForCausalLM.from_pretrained(tmp_path / "nearest" / "base", device_map="cpu"), tmp_path / "start"
        )


def test_an_adapter_of_a_base_that_is_quantized_as_it_loads_is_not_for_calibrated_codes(
    model: Path, tmp_path: Path
) -> None:
    build(model, tmp_path, NF4)
    build(model, tmp_path / "plain", NF4, base_output=None)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    with pytest.raises(MismatchError, match="codes of this model were chosen by calibration"):
        quailora.check_base(loaded, tmp_path / "plain" / "start")
    # One that was initialized on the base itself is for it, though its record names no folder.
    adapted = get_peft_model(loaded, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    report = quailora.initialize(adapted, tiny.sequences(), checkpoint=model, progress=False)
    adapted.save_pretrained(tmp_path / "own")
    report.save(tmp_path / "own")
    quailora.check_base(adapted, tmp_path / "own", checkpoint=model)


def test_nearest_rounding_written_is_what_transformers_quantizes(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path, NF4, rounding="nearest")
    written: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    made: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=NF4, device_map="cpu"
    )
    for name, module in made.named_modules():
        if is_quantized(module):
            codes, scales = read(module).parts(), read(written.get_submodule(name)).parts()
            assert all(
                torch.equal(a, b)
                for mine, theirs in zip(codes, scales, strict=True)
                for a, b in zip(mine, theirs, strict=True)
            )


def test_linears_without_an_adapter_are_quantized_all_the_same(model: Path, tmp_path: Path) -> None:
    report = build(model, tmp_path, target_modules=["q_proj"])
    assert len(report.layers) == 2 and len(report.record["base"]["digests"]) == 14
    dense(model, tmp_path)  # every digest is right


class Stop(Exception):
    """Of a run that is killed."""


def test_a_run_that_died_goes_on_and_gives_the_same_base(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(model, tmp_path / "whole")
    killed(monkeypatch, model, tmp_path)
    assert not (tmp_path / "base").exists() and not (tmp_path / "start").exists()
    with pytest.raises(QuailoraError, match=r"other settings.*alternations was 2 and is 1"):
        build(model, tmp_path, alternations=1)
    build(model, tmp_path)
    for path in (tmp_path / "whole" / "base").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "base" / path.name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "base", "start"}


def killed(monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, **settings: Any) -> None:
    """A run that dies after its first block."""
    write = base_output.BaseOutput.write_block

    def dies(self: Any, index: int, quantized: Any) -> None:
        if index == 1:
            raise Stop
        write(self, index, quantized)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(base_output.BaseOutput, "write_block", dies)
        build(model, folder, **settings)


def test_a_block_whose_file_was_lost_is_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(model, tmp_path / "whole")
    killed(monkeypatch, model, tmp_path)
    unfinished = tmp_path / ".base.quailora-base"
    (unfinished / "model-block-0000.safetensors").unlink()
    (unfinished / ".model-block-0001.safetensors.123").write_bytes(b"half of it")
    build(model, tmp_path)
    names = {path.name for path in (tmp_path / "whole" / "base").iterdir()}
    assert {path.name for path in (tmp_path / "base").iterdir()} == names
    for path in (tmp_path / "whole" / "base").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "base" / path.name).read_bytes()


def test_an_unfinished_base_of_another_adapter_is_not_taken(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, model, tmp_path / "one", base_output=tmp_path / "base")
    with pytest.raises(QuailoraError, match=r"unfinished base of a run that makes .*one/start"):
        build(model, tmp_path / "other", base_output=tmp_path / "base")
    assert not (tmp_path / "other" / "start").exists()
    build(model, tmp_path / "other", base_output=tmp_path / "base", resume=False)
    with pytest.raises(QuailoraError, match="is not empty"):
        build(model, tmp_path / "one", base_output=tmp_path / "base")


def test_a_run_that_is_discarded_takes_its_unfinished_base_along(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, model, tmp_path, base_output=tmp_path / "first", alternations=0)
    killed(monkeypatch, model, tmp_path / "other", base_output=tmp_path / "theirs", alternations=0)
    with pytest.raises(QuailoraError, match="other settings"):
        build(model, tmp_path)
    build(model, tmp_path, resume=False, alternations=0)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "start", "other", ".theirs.quailora-base"}


def test_an_h_that_took_more_damping_is_reported_after_a_resume(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"calibration": tiny.sequences(2, 8), "rounding_damping": 1e-12, "alternations": 0}
    whole = build(model, tmp_path / "whole", **few)
    killed(monkeypatch, model, tmp_path, **few)
    resumed = build(model, tmp_path, **few)
    (note,) = [note for note in whole.notes if "too poor for error feedback" in note]
    assert note.startswith("H of 14 linears") and note in resumed.notes


def test_a_weight_that_is_not_finite_would_stop_the_same_run_again(model: Path, tmp_path: Path) -> None:
    spoiled = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    kept = r"the factors of 1 block are kept in .*, but the same command would fail again until this is mended$"
    with pytest.raises(CheckpointError, match=kept):
        build(spoiled, tmp_path)


def test_norms_and_embeddings_belong_to_the_base_too(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path, NF4, alternations=0)
    start = tmp_path / "start"
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
    loaded.resize_token_embeddings(tiny.VOCABULARY + 8)
    adapted = get_peft_model(
        prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"]),
    )
    assert loaded.model.layers[0].input_layernorm.weight.dtype == torch.float32
    quailora.check_base(adapted, start)
    for name in ("norm", "layers.1.post_attention_layernorm.original_module"):
        with torch.no_grad():
            loaded.model.get_submodule(name).weight[3] *= 1.02
        with pytest.raises(
            MismatchError, match=rf"model\.{name.removesuffix('.original_module')}\.weight .* other values"
        ):
            quailora.check_base(adapted, start)
        with torch.no_grad():
            loaded.model.get_submodule(name).weight[3] = 1
    quailora.check_base(adapted, start)


def test_the_cards_say_how_a_gptq_base_is_loaded(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path, alternations=0)
    for folder in ("base", "start"):
        card = " ".join((tmp_path / folder / "README.md").read_text().split())
        assert 'quantization_config=GPTQConfig(bits=3, backend="auto_trainable")' in card
        assert "gptqmodel](https" in card
    build(model, tmp_path / "nf4", NF4, alternations=0)
    assert "GPTQConfig" not in (tmp_path / "nf4" / "start" / "README.md").read_text()


def test_magr_is_recorded_and_shown(model: Path, tmp_path: Path) -> None:
    report = build(model, tmp_path, alternations=0, magr=0.01)
    settings = {"damping": 0.1, "alternations": 0, "magr": 0.01, "inputs": "quantized"}
    assert report.record["base"]["rounding_settings"] == settings
    assert "MagR (arXiv 2406.00800, strength 0.01), then error feedback" in (tmp_path / "base/README.md").read_text()
    without = build(model, tmp_path / "without", alternations=0)
    assert "MagR" not in (tmp_path / "without/base/README.md").read_text()
    assert all(mine.digest != theirs.digest for mine, theirs in zip(report.layers, without.layers, strict=True))


def test_a_run_that_died_between_its_two_folders_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = base_output.BaseOutput.publish

    def dies(self: Any) -> None:
        publish(self)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(base_output.BaseOutput, "publish", dies)
        build(model, tmp_path)
    assert (tmp_path / "base").is_dir() and not (tmp_path / "start").exists()
    build(model, tmp_path)
    dense(model, tmp_path)  # every digest is right
    assert {path.name for path in tmp_path.iterdir()} == {"base", "start"}


def test_a_base_with_quantized_linears_outside_of_its_blocks_is_not_written(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", "opt", word_embed_proj_dim=32)
    with pytest.raises(AdapterError, match=r"project_(in|out) is quantized too, and is not in a block"):
        build(folder, tmp_path, NF4)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    build(folder, tmp_path, GPTQConfig(bits=4, group_size=32, desc_act=False))


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_base_is_trusted_as_the_checkpoints_is(
    trusted: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(model, tmp_path)
    opened = mock.Mock(side_effect=Stop)
    monkeypatch.setattr(quantized_checkpoint, "Checkpoint", opened)
    with pytest.raises(Stop):
        quailora.merge(Checkpoint(model, trust_remote_code=trusted), tmp_path / "start", tmp_path / "dense")
    assert opened.call_args.kwargs["trust_remote_code"] is trusted


def test_a_weight_of_other_bits_is_refused(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path / "three")
    build(model, tmp_path / "two", GPTQConfig(bits=2, group_size=32, desc_act=False))
    with pytest.raises((CheckpointError, MismatchError), match=r"packed in 3 bits|is not the weight"):
        quailora.merge(model, tmp_path / "three" / "start", tmp_path / "merged", base=tmp_path / "two" / "base")


def test_what_cannot_be_is_refused_before_anything_is_read(model: Path, tmp_path: Path) -> None:
    def fails(message: str, quantization: Any = INT3, **settings: Any) -> None:
        with pytest.raises(QuailoraError, match=message):
            build(model, tmp_path, quantization, **settings)
        assert list(tmp_path.iterdir()) == []

    fails("has to be written: give base_output", base_output=None)
    fails("its base|has to be written", NF4, base_output=None, rounding="calibrated")
    fails("not written as a checkpoint", BitsAndBytesConfig(load_in_8bit=True))
    fails("rounding='gptq'.*'nearest' or 'calibrated'", rounding="gptq")
    fails("rounding_damping.*above 0", rounding_damping=0.0)
    fails("alternations.*at least 0", alternations=-1)
    fails("q_proj: its 64 inputs are not whole groups of 128: take group_size 64", GPTQConfig(bits=3, group_size=128))
    fails("desc_act=False", GPTQConfig(bits=3, group_size=32, desc_act=True))
    for other in ("start", "start/base", ".", ".start.quailora"):
        fails("in each other's way", base_output=tmp_path / other)
    with pytest.raises(QuailoraError, match="is not empty"):
        build(model, tmp_path, base_output=model)


# Whose experts are one 3-D tensor, or whose linears are Conv1D or fused: they stay in full precision, as elsewhere.
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_at_3_bits(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    if family == "gpt2":  # its linears are Conv1D
        with pytest.raises(AdapterError, match="no linear of GPT2LMHeadModel"):
            build(checkpoint, tmp_path)
        return
    report = build(checkpoint, tmp_path, target_modules="all-linear")
    assert report.error_left < 1
    record = read_record(tmp_path / "start")
    assert record is not None
    written = QuantizedCheckpoint.recorded(record["base"])
    assert written is not None
    stream = StreamedModel(Checkpoint(checkpoint), torch.device("cpu"), torch.bfloat16)
    shapes = {name: linear_weight(linear).shape for block in stream.blocks for name, linear in block.linears().items()}
    for name in written.names:
        assert written.weight(name, stream).shape == tuple(shapes[name])
    expected = set(stream.checkpoint.tensors) - {stream.source(f"{name}.weight") for name in written.names}
    assert expected <= set(written.checkpoint.tensors)
    settings = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    left = shapes.keys() - set(written.names)
    assert ("modules_in_block_to_quantize" in settings) == bool(left)
