"""Vision-language models: the language part is initialized under the names of the class that is trained."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import quailora
from quailora.calibration.data import Calibration
from quailora.errors import CheckpointError, MismatchError
from quailora.evaluate import compare
from quailora.modeling.checkpoint import Checkpoint
from quailora.reporting.report import Report
from tests.helpers import tiny
from tests.integration.test_families import NF4, RANK, compare_with_oracle, oracle
from tests.integration.test_pipeline import lora

SEQUENCES = tuple(sequence % 120 for sequence in tiny.sequences())  # no image tokens
DATA = Calibration(SEQUENCES, "random tokens")
TEXT_ONLY, MULTIMODAL = "AutoModelForCausalLM", "AutoModelForImageTextToText"
LOADERS = {TEXT_ONLY: AutoModelForCausalLM, MULTIMODAL: AutoModelForImageTextToText}
VISION = "outside the language model"


def build(source: Path | Checkpoint, output: Path) -> Report:
    return quailora.build_adapter(
        source,
        lora(r=RANK),
        DATA,
        output,
        quantization=NF4,
        damping=0.0,
        iterations=8,
        batch_size=4,
        progress=False,
    )


def load(folder: Path, auto_class: str, quantized: bool = True) -> torch.nn.Module:
    config = NF4 if quantized else None
    return LOADERS[auto_class].from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    model.train()  # bitsandbytes on a CPU multiplies with Q itself then
    return model(input_ids=SEQUENCES[0][None], use_cache=False).logits


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.vision_language(tmp_path_factory.mktemp("qwen3_5") / "model", "qwen3_5")


@pytest.fixture(scope="module")
def adapters(qwen: Path) -> dict[str, Path]:
    for auto_class in LOADERS:
        build(Checkpoint(qwen, auto_class=auto_class), qwen.parent / auto_class)
    return {auto_class: qwen.parent / auto_class for auto_class in LOADERS}


@pytest.mark.parametrize("family", tiny.VISION_LANGUAGE)
def test_the_language_part_reaches_the_optimum_and_the_adapter_is_active(family: str, tmp_path: Path) -> None:
    folder = tiny.vision_language(tmp_path / "model", family)
    report = build(folder, tmp_path / "adapter")
    compare_with_oracle(report, oracle(folder, SEQUENCES, AutoModelForImageTextToText))
    assert report.left and all(VISION in why and "calibration data is text" in why for why in report.left.values())
    base = load(folder, MULTIMODAL)
    quailora.check_base(base, tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded = dict(model.named_parameters())
    for layer in report.layers:
        key = f"base_model.model.{layer.name}.lora_B"
        assert saved[f"{key}.weight"].any() and torch.equal(loaded[f"{key}.default.weight"], saved[f"{key}.weight"])


def test_the_class_is_that_of_the_configuration_or_the_one_asked_for(qwen: Path, adapters: dict[str, Path]) -> None:
    assert Checkpoint(qwen).auto_class == MULTIMODAL
    with pytest.raises(CheckpointError, match=r"'AutoModel' is not supported.*AutoModelForCausalLM"):
        Checkpoint(qwen, auto_class="AutoModel")
    for auto_class, folder in adapters.items():
        names = load_file(folder / "adapter_model.safetensors")
        assert any(".language_model." in name for name in names) is (auto_class == MULTIMODAL)
        assert f"from transformers import {auto_class}, " in (folder / "README.md").read_text()
        assert json.loads((folder / "quailora.json").read_text())["base"]["auto_class"] == auto_class


def test_a_model_of_the_other_class_is_refused_with_the_reason(qwen: Path, adapters: dict[str, Path]) -> None:
    for own, other in ((TEXT_ONLY, MULTIMODAL), (MULTIMODAL, TEXT_ONLY)):
        quailora.check_base(load(qwen, own), adapters[own])
        with pytest.raises(MismatchError, match=f"the adapter would be inactive. Load the model with {own}"):
            quailora.check_base(load(qwen, other), adapters[own])


@pytest.mark.parametrize("auto_class", LOADERS)
def test_initialize_goes_by_the_class_of_the_loaded_model(
    auto_class: str, qwen: Path, adapters: dict[str, Path]
) -> None:
    model = get_peft_model(load(qwen, auto_class), lora(r=RANK))
    report = quailora.initialize(model, DATA, checkpoint=qwen, damping=0.0, iterations=8, batch_size=4, progress=False)
    assert report.record["base"]["auto_class"] == auto_class
    assert all(VISION in why for why in report.left.values()) and bool(report.left) is (auto_class == MULTIMODAL)
    expected = PeftModel.from_pretrained(load(qwen, auto_class), str(adapters[auto_class]))
    assert torch.allclose(logits(model), logits(expected), atol=1e-4)


@pytest.mark.parametrize("auto_class", LOADERS)
def test_merge_and_eval_take_the_class_of_the_record(
    auto_class: str, qwen: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    quailora.merge(qwen, adapters[auto_class], tmp_path / "dense")
    expected = logits(PeftModel.from_pretrained(load(qwen, auto_class), str(adapters[auto_class])))
    found = logits(load(tmp_path / "dense", auto_class, quantized=False))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    comparison = compare(qwen, adapters[auto_class], DATA)
    assert comparison.adapted is not None and comparison.adapted.kl < comparison.quantized.kl


def test_a_model_that_no_supported_class_makes_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "model")
    AutoConfig.for_model("clip", architectures=["CLIPModel"]).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"no causal language model.*CLIPConfig") as caught:
        build(tmp_path / "model", tmp_path / "adapter")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, caught.value
